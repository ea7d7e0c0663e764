"""The work of the host per decode step, with an executor that computes nothing."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.config import CacheConfig, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import Request
from albireo_jax.runtime.batch import bucket_grid
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape
from albireo_jax.runtime.packed_step import StepPacker
from albireo_jax.sampling.routes import Route
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.simulated_executor import NullExecutor

_PAGE_SIZE = 16
_PROMPT_TOKENS = 128
_STOP_ID, _SAMPLED_ID = 2, 7
_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSample:
    """Seconds of each measured decode step of `rows` requests, one entry per step."""

    rows: int
    plan_s: tuple[float, ...]
    pack_s: tuple[float, ...]
    commit_s: tuple[float, ...]

    @property
    def step_s(self) -> tuple[float, ...]:
        """Plan, pack and commit together."""
        return tuple(sum(parts) for parts in zip(self.plan_s, self.pack_s, self.commit_s, strict=True))

    @property
    def median_step_s(self) -> float:
        """Median over the steps of plan, pack and commit together."""
        return statistics.median(self.step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBench:
    """Host times of decode steps, smallest batch first."""

    samples: tuple[HostSample, ...]

    def render(self) -> str:
        """Medians as text, in microseconds."""
        lines = [f"{'rows':>6}{'plan µs':>10}{'pack µs':>10}{'commit µs':>11}{'step µs':>10}"]
        for sample in self.samples:
            plan, pack, commit = (
                1e6 * statistics.median(seconds)
                for seconds in (sample.plan_s, sample.pack_s, sample.commit_s)
            )
            step = 1e6 * sample.median_step_s
            lines.append(f"{sample.rows:>6}{plan:>10.1f}{pack:>10.1f}{commit:>11.1f}{step:>10.1f}")
        return "\n".join(lines)


def bench_host(
    rows: Sequence[int] = (32, 128, 512),
    *,
    pack: Callable[[StepPlan], object],
    steps: int = 300,
    warmup_steps: int = 20,
) -> HostBench:
    """Time plan, `pack` and commit of `steps` decode steps at each number of rows, two steps in flight."""
    return HostBench(
        samples=tuple(_bench(count, pack=pack, steps=steps, warmup_steps=warmup_steps) for count in rows)
    )


def plan_packer(max_rows: int) -> Callable[[StepPlan], object]:
    """Packs plans of up to `max_rows` rows by the function that the executor calls."""
    packer = StepPacker(
        bucket_grid(max_rows, 2 * max_rows),
        LogitRulesShape(num_slots=max_rows + 1, padded_vocab=_VOCAB_SIZE, max_len=_PROMPT_TOKENS),
        routes=(Route.GREEDY, Route.UNFILTERED, Route.ALL_TO_ALL),
        page_size=CacheConfig().page_size,
        pages_per_slot=1,
        decode_steps=1,
    )
    return packer.pack


def _bench(rows: int, *, pack: Callable[[StepPlan], object], steps: int, warmup_steps: int) -> HostSample:
    scheduler = _scheduler_with_requests(rows, num_steps=steps + warmup_steps)
    executor = NullExecutor(token_id=_SAMPLED_ID, clock=time.perf_counter)
    prompts = _plan(scheduler)
    in_flight = deque([(prompts, executor.dispatch(prompts))])
    times: list[tuple[float, float, float]] = []
    for _ in range(warmup_steps + steps):
        begin_s = time.perf_counter()
        plan = _plan(scheduler)
        planned_s = time.perf_counter()
        pack(plan)
        packed_s = time.perf_counter()
        in_flight.append((plan, executor.dispatch(plan)))
        oldest, handle = in_flight.popleft()
        commit_s = time.perf_counter()
        scheduler.commit(oldest, handle.wait())
        end_s = time.perf_counter()
        times.append((planned_s - begin_s, packed_s - planned_s, end_s - commit_s))
    plan_s, pack_s, commit_s = zip(*times[warmup_steps:], strict=True)
    return HostSample(rows=rows, plan_s=plan_s, pack_s=pack_s, commit_s=commit_s)


def _scheduler_with_requests(rows: int, *, num_steps: int) -> Scheduler:
    """Requests whose prompts fit in the first step, of lengths that spread their page ends over the steps."""
    prompt_lens = [_PROMPT_TOKENS + row % _PAGE_SIZE for row in range(rows)]
    max_tokens = num_steps + 2  # none of them ends
    max_len = max(prompt_lens) + max_tokens
    limits = EngineLimits(
        max_model_len=max_len,
        vocab_size=_VOCAB_SIZE,
        num_pages=rows * -(-max_len // _PAGE_SIZE) + rows,  # and the one for each that admission wants free
        page_size=_PAGE_SIZE,
    )
    config = SchedulerConfig(max_rows=rows, max_step_tokens=sum(prompt_lens), depth=2)
    scheduler = Scheduler(config, limits)
    for row, prompt_len in enumerate(prompt_lens):
        scheduler.add(
            Request(
                request_id=f"request-{row}",
                prompt_token_ids=np.ones(prompt_len, np.int32),
                max_tokens=max_tokens,
                stop_ids=(_STOP_ID,),
                cache_salt=str(row),  # or they would wait for each other's pages
            )
        )
    return scheduler


def _plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None, "a batch that decodes has nothing to plan"
    return plan
