"""Several steps in one dispatch: tokens per second, bursts, and rows that idle in a loop.

All requests of a run begin together, so that nothing waits and every plan after their prompts has k steps.
One engine of each model is compiled, and each repeat runs k = 1, 2, 4, 8 at depth 1 and 2 over it, another of
them first each time. The clock starts when the last request has its first token. In the second kind of run
each request ends at a stop id, at a token drawn between the first and the last.

    python -m benchmarks.peers.make_bench_model MODELS
    python -m benchmarks.studies.decode_steps stories260k MODELS/llama60m-float32
    python -m benchmarks.studies.decode_steps stories260k --small     a quick try
"""

import random
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from albireo_jax.core.config import Dtype, EngineConfig, SchedulerConfig
from albireo_jax.core.plan import Executor, SampledTokens, StepHandle, StepPlan
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, Timeline
from albireo_jax.launch import Prepared, prepare
from albireo_jax.measure.records import SampleTable, Series
from albireo_jax.sched.scheduler import Scheduler
from benchmarks.lib.recording import Recording, script_parser

NOTE = (
    "Decode steps only. Programs of k > 1 are one compiled loop for up to max(k) steps. A burst is what one "
    "dispatch brings a request; unused: row-steps of the device, computed or as padding, that gave no token "
    "to any request."
)


class DecodeWay(NamedTuple):
    """How an engine runs: k steps in one dispatch, so many dispatches in flight."""

    steps: int
    depth: int

    @property
    def name(self) -> str:
        """The way in a table or record."""
        return f"k={self.steps} depth {self.depth}"


class DecodeStepsCase(NamedTuple):
    """A model, so many requests at once, and whether they end at stops or at their length."""

    model: str
    rows: int
    stops: bool

    @property
    def name(self) -> str:
        """The case in a table or record."""
        return f"{self.model} {self.rows} rows" + (" stops" if self.stops else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """One run: decoded tokens and seconds, seconds between the bursts, and row-steps without a token."""

    case: DecodeStepsCase
    way: DecodeWay
    tokens: int
    seconds: float
    burst_s: float
    unused: int

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second."""
        return self.tokens / self.seconds


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("models", nargs="+", help="Hugging Face folders")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--input-len", type=int, default=32)
    made.add_argument("--output-len", type=int, default=97)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--small", action="store_true", help="few rows, tokens and repeats")
    return made


def prepared(model: str, options: Namespace) -> Prepared:
    """An engine that can take each way."""
    rows = max(options.rows)
    config = EngineConfig(
        model=model,
        dtype=Dtype(options.dtype),
        max_model_len=options.input_len + options.output_len,
        max_logprobs=0,
        scheduler=SchedulerConfig(
            max_rows=rows, max_step_tokens=max(rows, 256), decode_steps=max(options.steps)
        ),
    )
    return prepare(config)


class RowStepMeter:
    """An executor that counts the row-steps that the one behind it took, used or not."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.row_steps = 0

    def dispatch(self, plan: StepPlan) -> "MeteredHandle":
        """Queue a plan behind the meter."""
        return MeteredHandle(self, plan, self._executor.dispatch(plan))


class MeteredHandle(NamedTuple):
    """A dispatched plan whose row-steps are counted when its result is there."""

    meter: RowStepMeter
    plan: StepPlan
    handle: StepHandle

    def wait(self) -> SampledTokens:
        """The result."""
        sampled = self.handle.wait()
        repeated = len(self.plan.steps) > 0
        rows = self.plan.num_rows * int(sampled.counts.max()) if repeated else int(self.plan.samples.sum())
        self.meter.row_steps += rows
        return sampled


class CommitOutputs(NamedTuple):
    """The outputs of one commit, and their moment."""

    moment_s: float
    outputs: list[RequestOutput]


def run(
    ready: Prepared, way: DecodeWay, requests: Sequence[Request], *, executor: Executor
) -> list[CommitOutputs]:
    """All outputs of requests that begin together."""
    config = replace(ready.config.scheduler, decode_steps=way.steps, depth=way.depth)
    scheduler = Scheduler(config, ready.limits, shares_prefixes=False)
    loop = EngineLoop(scheduler, executor, depth=way.depth, timeline=Timeline(capacity=ALL_STEPS))
    for request in requests:
        scheduler.add(request)
    found: list[CommitOutputs] = []
    while loop.has_work:
        outputs = loop.step()
        found.append(CommitOutputs(time.perf_counter(), outputs))
    return [each for each in found if each.outputs]


def requests_of(case: DecodeStepsCase, ready: Prepared, options: Namespace) -> list[Request]:
    """The requests of a case; those that stop do so at a token that they are known to say."""
    draw = random.Random(case.rows)
    vocabulary = range(3, ready.limits.vocab_size)
    requests = [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=np.array(draw.choices(vocabulary, k=options.input_len), np.int32),
            max_tokens=options.output_len,
            sampling=TokenSampling(temperature=options.temperature, seed=index),
        )
        for index in range(case.rows)
    ]
    if not case.stops:
        return requests
    said: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for _, outputs in run(ready, DecodeWay(1, 1), requests, executor=ready.executor):
        for output in outputs:
            said[output.request_id] += [] if output.token_id is None else [output.token_id]
    return [replace(request, stop_ids=(draw.choice(said[request.request_id][1:]),)) for request in requests]


def measure(
    case: DecodeStepsCase, way: DecodeWay, ready: Prepared, *, requests: Sequence[Request]
) -> DecodeRun:
    """One run, from when the last request has its first token."""
    meter = RowStepMeter(ready.executor)
    found = run(ready, way, requests, executor=meter)
    first_at = {
        output.request_id: at for at, each in reversed([*enumerate(found)]) for output in each.outputs
    }
    decoded = found[max(first_at.values()) :]
    return DecodeRun(
        case=case,
        way=way,
        tokens=sum(len(outputs) for _, outputs in decoded[1:]),
        seconds=decoded[-1].moment_s - decoded[0].moment_s,
        burst_s=statistics.median(b.moment_s - a.moment_s for a, b in pairwise(decoded)),
        unused=meter.row_steps - sum(len(outputs) for _, outputs in found),
    )


def runs_of(model: str, options: Namespace) -> list[DecodeRun]:
    """All runs of a model but the first round of each case, which warms up."""
    ready = prepared(model, options)
    ways = [DecodeWay(steps, depth) for depth in options.depths for steps in options.steps]
    found: list[DecodeRun] = []
    for case in (
        DecodeStepsCase(Path(model).name, rows, stops) for rows in options.rows for stops in (False, True)
    ):
        requests = requests_of(case, ready, options)
        for repeat in range(-1, options.repeats):
            first = repeat % len(ways)
            taken = [measure(case, way, ready, requests=requests) for way in (*ways[first:], *ways[:first])]
            found += taken if repeat >= 0 else []
        print(f"{case.name}: measured", file=sys.stderr)
    return found


def series_of(runs: Sequence[DecodeRun]) -> list[Series]:
    """Every repeat's figures, and the gains over k = 1 at the same depth."""
    baseline: dict[tuple[DecodeStepsCase, int], list[float]] = {}
    for each in runs:
        if each.way.steps == 1:
            baseline.setdefault((each.case, each.way.depth), []).append(each.tokens_per_s)
    table, repeats = SampleTable(), Counter[tuple[DecodeStepsCase, DecodeWay]]()
    for each in runs:
        repeat = repeats[each.case, each.way]
        repeats[each.case, each.way] += 1
        figures = {
            ("gain over k=1", "1"): each.tokens_per_s / baseline[each.case, each.way.depth][repeat],
            ("decoded", "tokens/s"): each.tokens_per_s,
            ("time between bursts", "s"): each.burst_s,
            ("unused", "row-steps"): each.unused,
        }
        table.add(each.way.name, each.case.name, figures)
    return table.series()


def text_table(series: Sequence[Series]) -> str:
    """Medians, a line for each way and case, and the range of the gains."""
    of = {(each.case, each.subject, each.metric): each for each in series}
    lines = [f"{'':40}{'tokens/s':>10}{'gain':>22}{'burst ms':>10}{'unused':>8}"]
    for case, way in dict.fromkeys((each.case, each.subject) for each in series):
        gain = of[case, way, "gain over k=1"]
        lines.append(
            f"{case + ', ' + way:40}{of[case, way, 'decoded'].median:10,.0f}"
            f"{gain.median:8.2f} ({min(gain.samples):.2f} … {max(gain.samples):.2f})"
            f"{1e3 * of[case, way, 'time between bursts'].median:10.2f}{of[case, way, 'unused'].median:8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    if options.small:
        options.rows, options.output_len, options.repeats = [1, 4], 17, 1
    series = series_of([each for model in options.models for each in runs_of(model, options)])
    print(text_table(series))
    names = [Path(model).name for model in options.models]
    recording.write("decode-steps", series, note=NOTE, settings={"models": names})


if __name__ == "__main__":
    main()
