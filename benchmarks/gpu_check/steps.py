"""Single steps of the engine, through its own executor and compiled programs, and how long they take.

The plans are made here and not by a scheduler: rows whose context is "already computed", in pages scattered
over the pool, as after a hit in the prefix cache. So a step at 16k tokens of context is measured without
computing them first. Keys and values are zeros then, which no kernel can tell from others by its time.

Bytes and flops are those of `sim.cost.RankWork`: weights read once, each row's keys and values read once.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.plan import TOKEN_ON_DEVICE, Executor, SlotParams, StepHandle, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.launch import Prepared
from albireo_jax.sim.cost import RankWork, StepWork
from benchmarks.lib.plain_plans import plain_plan

_DEPTH = 2
_REPEATS = 3
MOST_STEPS, _LEAST_STEPS = 24, 3
_REPEAT_S = 0.5
_QUEUED_PROMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """A decode step of `rows` rows, each over `context` cached tokens."""

    rows: int
    context: int

    @property
    def name(self) -> str:
        """The case in a table."""
        return f"{self.rows} rows, {self.context} context"

    def fits(self, ready: Prepared) -> bool:
        """Whether the engine's memory and limits hold it."""
        tokens = self.context + MOST_STEPS + 1
        pages = self.rows * -(-tokens // ready.limits.page_size)
        return tokens <= ready.limits.max_model_len and pages <= ready.limits.num_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Mean seconds of a step in each repeat, and seconds of each dispatch on the host."""

    step_s: tuple[float, ...]
    dispatch_s: tuple[float, ...]


def scattered_pages(rows: int, tokens: int, *, page_size: int, num_pages: int) -> list[tuple[int, ...]]:
    """Pages for so many tokens of each row, in no order; none twice. Raises ValueError if too few."""
    each = -(-tokens // page_size)
    if rows * each > num_pages:
        raise ValueError(f"{rows} rows of {tokens} tokens take {rows * each} pages, there are {num_pages}")
    drawn = 1 + np.random.default_rng(0).permutation(num_pages)[: rows * each]
    return [tuple(pages) for pages in drawn.reshape(rows, each).tolist()]


def admission(pages: Sequence[tuple[int, ...]], sampling: TokenSampling = GREEDY) -> StepPlan:
    """A step that gives each row a slot that begins with its pages, and computes one token of the first."""
    slots = tuple(
        SlotParams(
            slot=slot,
            sampling=sampling,
            banned_until=0,
            stop_ids=(),
            pages=own,
        )
        for slot, own in enumerate(pages)
    )
    return plain_plan([0], [1], new_slots=slots)


def decode_plans(case: DecodeCase, *, steps: int) -> list[StepPlan]:
    """Decode steps of rows that were admitted, one after the other."""
    return [
        plain_plan(
            [case.context + step] * case.rows, [1] * case.rows, token_ids=TOKEN_ON_DEVICE, step=1 + step
        )
        for step in range(steps)
    ]


def prompt_plans(tokens: int, *, chunk: int) -> list[StepPlan]:
    """Steps that compute a whole prompt of the first slot, `chunk` random tokens each."""
    drawn = np.random.default_rng(0).integers(1, 256, tokens).astype(np.int32)
    return [
        plain_plan([start], [len(ids)], token_ids=ids, step=1)
        for start, ids in zip(
            range(0, tokens, chunk), np.split(drawn, range(chunk, tokens, chunk)), strict=True
        )
    ]


def run_steps(executor: Executor, plans: Sequence[StepPlan]) -> StepTimes:
    """Steps with two in flight, as the overlapped engine has them; one mean over all but the first."""
    ends_s, dispatches_s = _ends_s(executor, plans)
    step_s = ((ends_s[-1] - ends_s[0]) / (len(ends_s) - 1),) if len(ends_s) > 1 else ()
    return StepTimes(step_s=step_s, dispatch_s=tuple(dispatches_s[1:]))


def _ends_s(executor: Executor, plans: Sequence[StepPlan]) -> tuple[list[float], list[float]]:
    """When the host had waited for each step, and how long its dispatch took on the host."""
    in_flight: deque[StepHandle] = deque()
    ends_s: list[float] = []
    dispatches_s: list[float] = []
    for plan in plans:
        began_s = time.perf_counter()
        in_flight.append(executor.dispatch(plan))
        dispatches_s.append(time.perf_counter() - began_s)
        if len(in_flight) == _DEPTH:
            in_flight.popleft().wait()
            ends_s.append(time.perf_counter())
    for handle in in_flight:
        handle.wait()
        ends_s.append(time.perf_counter())
    return ends_s, dispatches_s


def time_steps(executor: Executor, plans: Sequence[StepPlan]) -> StepTimes:
    """Repeats of these steps, of as many of them as take half a second."""
    run_steps(executor, plans[:_LEAST_STEPS])  # warms up
    estimate_s = max(run_steps(executor, plans[:_LEAST_STEPS]).step_s[0], 1e-6)
    count = max(_LEAST_STEPS, min(len(plans), int(_REPEAT_S / estimate_s)))
    runs = [run_steps(executor, plans[:count]) for _ in range(_REPEATS)]
    return StepTimes(
        step_s=tuple(run.step_s[0] for run in runs),
        dispatch_s=tuple(seconds for run in runs for seconds in run.dispatch_s),
    )


def time_prompt(executor: Executor, plans: Sequence[StepPlan]) -> tuple[float, ...]:
    """Seconds of a prompt of these steps, in each repeat a mean of some that are queued behind another."""
    run_steps(executor, plans)  # warms up
    count = len(plans)
    runs = [_ends_s(executor, [*plans] * (1 + _QUEUED_PROMPTS))[0] for _ in range(_REPEATS)]
    return tuple((ends_s[-1] - ends_s[count - 1]) / _QUEUED_PROMPTS for ends_s in runs)


def admit(ready: Prepared, *, rows: int, tokens: int, sampling: TokenSampling = GREEDY) -> None:
    """Give so many rows a slot and pages for so many tokens each."""
    pages = scattered_pages(rows, tokens, page_size=ready.limits.page_size, num_pages=ready.limits.num_pages)
    ready.executor.dispatch(admission(pages, sampling)).wait()


def work_of(ready: Prepared, plan: StepPlan) -> StepWork:
    """Bytes and flops of a step of this engine."""
    kv_dtype = ready.config.cache.kv_dtype
    return RankWork(ready.model_config, tp=1, dtype=ready.dtype, kv_dtype=kv_dtype).of(plan)
