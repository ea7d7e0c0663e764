"""Throughput and latency of a running engine under random prompts.

A *run* sends all prompts of a workload at once and reads their streams to the end. Warm-up runs come first
and are not counted; the task table covers exactly the runs that are.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.timeline import TaskTable, Timeline, render


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchWorkload:
    """`num_prompts` random prompts of `input_len` ids below `vocab_size`, each continued by `output_len` ids.

    The end-of-sequence is ignored, so that every run does the same work. `temperature` 0 is greedy.
    """

    num_prompts: int
    input_len: int
    output_len: int
    vocab_size: int
    seed: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        """Refuse workloads that do nothing."""
        for name, value in (
            ("num_prompts", self.num_prompts),
            ("input_len", self.input_len),
            ("output_len", self.output_len),
            ("vocab_size", self.vocab_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def case(self) -> str:
        """The workload in a table or record."""
        return f"{self.num_prompts} requests {self.input_len} in {self.output_len} out"

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of every prompt."""
        return SamplingParams(
            max_tokens=self.output_len, temperature=self.temperature, ignore_eos=True, seed=self.seed
        )

    def prompts(self, run: int) -> list[tuple[int, ...]]:
        """The prompts of one run; no two runs share any."""
        rng = random.Random(f"{self.seed} {run}")
        return [tuple(rng.choices(range(self.vocab_size), k=self.input_len)) for _ in range(self.num_prompts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """Times of a run's tokens, in seconds from its start.

    `first_s` and `end_s` hold one entry per request, `gaps_s` the time between the arrivals of tokens of the
    same request.
    """

    first_s: tuple[float, ...]
    end_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    num_tokens: int

    @property
    def total_s(self) -> float:
        """Until the last request ended."""
        return max(self.end_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """The counted runs of a workload and where their time went."""

    workload: BenchWorkload
    runs: tuple[RunTimes, ...]
    task_table: TaskTable

    @property
    def output_tokens_per_s(self) -> tuple[float, ...]:
        """Generated tokens per second, of each run."""
        return tuple(run.num_tokens / run.total_s for run in self.runs)

    @property
    def requests_per_s(self) -> tuple[float, ...]:
        """Requests per second, of each run."""
        return tuple(self.workload.num_prompts / run.total_s for run in self.runs)

    @property
    def first_s(self) -> tuple[float, ...]:
        """Time to the first token, of each request of all runs."""
        return tuple(seconds for run in self.runs for seconds in run.first_s)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between tokens, of all requests of all runs."""
        return tuple(seconds for run in self.runs for seconds in run.gaps_s)

    @property
    def end_s(self) -> tuple[float, ...]:
        """Time to the last token, of each request of all runs."""
        return tuple(seconds for run in self.runs for seconds in run.end_s)


def bench_throughput(
    frontend: Frontend, timeline: Timeline, workload: BenchWorkload, *, repeats: int = 3, warmups: int = 1
) -> BenchResult:
    """All prompts at once, `repeats` times after `warmups` runs that do not count."""
    return _bench(frontend, timeline, workload, runs=range(-warmups, repeats))


def bench_latency(
    frontend: Frontend, timeline: Timeline, workload: BenchWorkload, *, repeats: int = 10, warmups: int = 2
) -> BenchResult:
    """The same with many short runs, usually of one prompt: read the times, not the throughput."""
    return _bench(frontend, timeline, workload, runs=range(-warmups, repeats))


def render_throughput(result: BenchResult) -> str:
    """Tokens and requests per second as text, and the task table."""
    tokens, requests = result.output_tokens_per_s, result.requests_per_s
    median = statistics.median(tokens)
    both = median * (result.workload.input_len + result.workload.output_len) / result.workload.output_len
    return "\n".join(
        (
            f"{result.workload.case}, median of {len(result.runs)} runs",
            f"{'output tokens/s':<24}{median:>10.1f}   ({min(tokens):.1f} … {max(tokens):.1f})",
            f"{'input + output tokens/s':<24}{both:>10.1f}",
            f"{'requests/s':<24}{statistics.median(requests):>10.2f}",
            "",
            render(result.task_table),
        )
    )


def render_latency(result: BenchResult) -> str:
    """Percentiles of the times as text, and the task table."""
    lines = [
        f"{result.workload.case}, {len(result.runs)} runs",
        f"{'ms':<24}{'median':>10}{'p90':>10}{'p99':>10}{'largest':>10}",
    ]
    for name, seconds in (
        ("time to first token", result.first_s),
        ("between tokens", result.gaps_s),
        ("end to end", result.end_s),
    ):
        if seconds:
            row = (*(percentile(seconds, share) for share in (0.5, 0.9, 0.99)), max(seconds))
            lines.append(f"{name:<24}" + "".join(f"{value * 1e3:>10.2f}" for value in row))
    return "\n".join((*lines, "", render(result.task_table)))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]


def _bench(frontend: Frontend, timeline: Timeline, workload: BenchWorkload, *, runs: range) -> BenchResult:
    """Runs below 0 are warm-ups."""
    counted: list[RunTimes] = []
    for run in runs:
        if run == 0:
            timeline.clear()
        times = _run(frontend, workload.prompts(run), workload.params, clock=time.perf_counter)
        if run >= 0:
            counted.append(times)
    return BenchResult(workload=workload, runs=tuple(counted), task_table=timeline.table())


def _run(
    frontend: Frontend,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    clock: Callable[[], float],
) -> RunTimes:
    arrivals: list[list[float]] = [[] for _ in prompts]
    num_tokens = 0
    start_s = clock()
    with frontend.stream(prompts, params) as output:
        for deltas in output:
            now_s = clock() - start_s
            for delta in deltas:
                if delta.token_ids:
                    arrivals[delta.choice].append(now_s)
                    num_tokens += len(delta.token_ids)
    expected = len(prompts) * (params.max_tokens or 0)
    if num_tokens != expected:
        raise RuntimeError(f"{num_tokens} tokens came, {expected} were asked for")
    return RunTimes(
        first_s=tuple(moments[0] for moments in arrivals),
        end_s=tuple(moments[-1] for moments in arrivals),
        gaps_s=tuple(b - a for moments in arrivals for a, b in pairwise(moments)),
        num_tokens=num_tokens,
    )
