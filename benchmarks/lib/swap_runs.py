"""The cost of too little KV memory: many conversations in all the memory they want, and in a third of it.

All conversations take their first turn, then all their second, and so on: when one goes on, all the others
have been there since, and the page that was left longest ago is always the next one that is wanted. Three
engines are compared:

    endless     pages for all conversations to their ends
    swap        a third of these, and as many host pages as there is demand for
    recompute   a third of these: what is evicted is computed again
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from albireo_jax.core.config import Dtype, ModelConfig, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.memory import page_bytes
from albireo_jax.core.plan import CopyCosts, StepPlan
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, TaskTable, Timeline
from albireo_jax.measure.records import Series
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sim.lanes import Clock, Cost
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import replay

PAGE_SIZE = 16
Tokens = tuple[int, ...]
Answer = Callable[[list[Tokens], int], list[Tokens]]
"""Answers prompts with so many tokens each."""


class Memory(StrEnum):
    """The KV memory of an engine."""

    ENDLESS = "endless"
    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Pages of an engine on the device and on the host."""

    device: int
    host: int

    @classmethod
    def of(cls, memory: Memory, *, demand: int) -> "Pages":
        """The pages of a kind of memory where endless memory would hold `demand` pages in the end."""
        if memory is Memory.ENDLESS:
            return cls(device=demand, host=0)
        return cls(device=-(-demand // 3), host=demand if memory is Memory.SWAP else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapRun:
    """A run of all conversations: its seconds, the tokens it generated, and what was counted and timed.

    `stats` count since the engine's start.
    """

    seconds: float
    num_tokens: int
    stats: SchedulerStats
    table: TaskTable

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Talks:
    """`count` conversations of `turns` turns; each adds random `said` tokens and gets `answered` tokens."""

    count: int
    turns: int
    said: int
    answered: int
    vocab_size: int
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a conversation at its end."""
        return self.turns * (self.said + self.answered)

    @property
    def demand(self) -> int:
        """Pages that hold all conversations at their ends."""
        return self.count * -(-self.length // PAGE_SIZE)

    def hold(self, answer: Answer) -> int:
        """Hold all conversations with what answers prompts with so many tokens; gives the tokens answered."""
        random = np.random.default_rng(self.seed)
        texts: list[Tokens] = [()] * self.count
        num_answered = 0
        for _ in range(self.turns):
            said = random.integers(self.vocab_size, size=(self.count, self.said)).tolist()
            texts = [(*text, *new) for text, new in zip(texts, said, strict=True)]
            answers = answer(texts, self.answered)
            num_answered += sum(map(len, answers))
            texts = [text + tokens for text, tokens in zip(texts, answers, strict=True)]
        return num_answered


def run_engine(
    frontend: Frontend, talks: Talks, *, stats: Callable[[], SchedulerStats], timeline: Timeline
) -> SwapRun:
    """The conversations with a running engine, whose timeline is cleared first."""

    def answer(texts: list[Tokens], max_tokens: int) -> list[Tokens]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return [completion.token_ids for completion in frontend.generate(texts, params)]

    return run_talks(answer, talks, stats=stats, timeline=timeline)


def run_talks(
    answer: Answer, talks: Talks, *, stats: Callable[[], SchedulerStats], timeline: Timeline
) -> SwapRun:
    """The conversations with what answers them through an engine; its timeline is cleared first."""
    timeline.clear()
    began_s = timeline.clock()
    num_tokens = talks.hold(answer)
    seconds = timeline.clock() - began_s
    return SwapRun(seconds=seconds, num_tokens=num_tokens, stats=stats(), table=timeline.table())


def swap_series(subject: str, memory: Memory, runs: Sequence[SwapRun]) -> list[Series]:
    """The figures of the runs in one kind of memory; counts are those since the engine's start."""

    def series(metric: str, unit: str, values: list[float]) -> Series:
        return Series(subject=subject, case=memory.value, metric=metric, unit=unit, samples=tuple(values))

    found = [
        series("generated tokens", "1/s", [run.tokens_per_s for run in runs]),
        series("preemptions", "1", [run.stats.preemptions for run in runs]),
        series("prompt tokens found", "1", [run.stats.cache.cached_tokens for run in runs]),
        series("pages copied to the host", "1", [run.stats.tiers.copied_out for run in runs]),
        series("pages copied to the device", "1", [run.stats.tiers.copied_in for run in runs]),
    ]
    if memory is Memory.SWAP:
        tables = [run.table for run in runs]
        per_step = [1e6 / table.steps for table in tables]
        exposed = [table.copies.exposed_s * each for table, each in zip(tables, per_step, strict=True)]
        copying = [table.copies.total_s * each for table, each in zip(tables, per_step, strict=True)]
        found.append(series("copying per step", "us", copying))
        found.append(series("exposed copying per step", "us", exposed))
        if all(copying):
            hidden = [1 - e / c for e, c in zip(exposed, copying, strict=True)]
            found.append(series("hidden share of copying", "1", hidden))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevice:
    """A device on a clock: what a step costs it, and what a page costs on the bus to the host."""

    model: ModelConfig
    cost: Cost
    page_copy_s: float

    @classmethod
    def over_bus(
        cls, model: ModelConfig, cost: Cost, *, dtype: Dtype, bus_bytes_per_s: float
    ) -> "SimulatedDevice":
        """One whose pages go over a bus of this speed."""
        size = page_bytes(model, tp=1, page_size=PAGE_SIZE, dtype=dtype)
        return cls(model=model, cost=cost, page_copy_s=size / bus_bytes_per_s)


def simulate(device: SimulatedDevice, talks: Talks, pages: Pages, *, config: SchedulerConfig) -> SwapRun:
    """The conversations on the simulator's clock."""
    limits = EngineLimits(
        max_model_len=device.model.max_position,
        vocab_size=device.model.vocab_size,
        num_pages=pages.device,
        page_size=PAGE_SIZE,
        num_host_pages=pages.host,
    )
    clock = Clock()
    executor = SimExecutor(
        limits, max_rows=config.max_rows, cost=device.cost, clock=clock, page_copy_s=device.page_copy_s
    )
    costs = _costs(device, limits, tokens=config.max_step_tokens)
    scheduler = Scheduler(config, limits, copy_costs=costs)
    timeline = Timeline(clock=clock, capacity=ALL_STEPS)
    loop = EngineLoop(scheduler, executor, depth=config.depth, timeline=timeline)

    def answer(texts: list[Tokens], max_tokens: int) -> list[Tokens]:
        requests = [
            Request(
                request_id=str(index),
                prompt_token_ids=token_array("a text", text),
                max_tokens=max_tokens,
                arrived_s=clock(),
            )
            for index, text in enumerate(texts)
        ]
        answers: list[list[int]] = [[] for _ in texts]
        for timed in replay(loop, requests, clock=clock):
            if timed.output.token_id is not None:
                answers[int(timed.output.request_id)].append(timed.output.token_id)
        return [tuple(tokens) for tokens in answers]

    return SwapRun(
        num_tokens=talks.hold(answer),
        seconds=clock(),
        stats=scheduler.stats(),
        table=timeline.table(),
    )


def _costs(device: SimulatedDevice, limits: EngineLimits, *, tokens: int) -> CopyCosts:
    """The costs that the scheduler would measure on `device`."""
    return CopyCosts(
        page_s=device.page_copy_s,
        token_s=device.cost(_prompt_step(tokens, limits)) / tokens,
        wait_s=2 * device.cost(_prompt_step(1, limits)),
    )


def _prompt_step(tokens: int, limits: EngineLimits) -> StepPlan:
    """A step that computes the first tokens of a prompt."""
    scheduler = Scheduler(SchedulerConfig(max_rows=1, max_step_tokens=tokens), limits)
    scheduler.add(Request(request_id="first", prompt_token_ids=np.zeros(tokens, np.int32), max_tokens=1))
    plan = scheduler.plan()
    assert plan is not None, "a request that is alone starts"
    return plan
