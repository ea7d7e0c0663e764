"""The cost of too little KV memory, with a host tier and without: conversations in a third of their pages.

All conversations take their first turn, then all their second, and so on: when one goes on, all the others
have been there since, and the page that was left longest ago is always the next one that is wanted. Three
engines are compared:

    endless     pages for all conversations to their ends
    swap        a third of these, and as many host pages as there is demand for
    recompute   a third of these: what is evicted is computed again

On the engine (`--models`), all kinds of memory in turn, so that they share the machine's noise; and on the
simulator (`--config`), whose device is the roofline of an H100 and whose bus is what `--bus-gb-per-s` says:
nothing of that was measured on a GPU.

    python -m benchmarks.swap --models smollm2 --config config.json
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from albireo_jax import LLM
from albireo_jax.core.config import Dtype, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.memory import page_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.core.plan import CopyCosts, StepPlan
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, TaskTable, Timeline
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.models.registry import model_config
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sim.cost import H100_SXM, roofline_cost
from albireo_jax.sim.lanes import Clock, Cost
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import replay
from benchmarks.lib.recording import Recording, script_parser

PAGE_SIZE = 16
_VOCAB = 400
"""Ids of the prompts are below: every vocabulary has them."""

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
    figures: dict[tuple[str, str], list[float]] = {
        ("generated tokens", "1/s"): [run.tokens_per_s for run in runs],
        ("preemptions", "1"): [run.stats.preemptions for run in runs],
        ("prompt tokens found", "1"): [run.stats.cache.cached_tokens for run in runs],
        ("pages copied to the host", "1"): [run.stats.tiers.copied_out for run in runs],
        ("pages copied to the device", "1"): [run.stats.tiers.copied_in for run in runs],
    }
    if memory is Memory.SWAP:
        copies = [(run.table.copies, 1e6 / run.table.steps) for run in runs]
        copying = [copy.total_s * each for copy, each in copies]
        exposed = [copy.exposed_s * each for copy, each in copies]
        figures["copying per step", "us"] = copying
        figures["exposed copying per step", "us"] = exposed
        if all(copying):
            shares = [1 - e / c for e, c in zip(exposed, copying, strict=True)]
            figures["hidden share of copying", "1"] = shares
    return series_by_metric(subject, memory.value, figures)


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


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("--models", nargs="*", default=[], help="built-in names or folders, run here")
    made.add_argument("--config", type=Path, help="a Hugging Face config.json, simulated")
    made.add_argument("--bus-gb-per-s", type=float, default=25.0)
    made.add_argument("--talks", type=int, default=24, help="conversations, on the engine")
    made.add_argument("--turns", type=int, default=4)
    made.add_argument("--said", type=int, default=96, help="tokens that a turn adds, on the engine")
    made.add_argument("--answered", type=int, default=32, help="tokens of an answer, on the engine")
    made.add_argument("--simulated-talks", type=int, default=64, help="of 8 times as long turns")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--repeats", type=int, default=3)
    return made


def bench_engine(model: str, options: Namespace) -> list[Series]:
    """Series of a model on this machine; every kind of memory has an engine, and they take turns."""
    talks = Talks(
        count=options.talks,
        turns=options.turns,
        said=options.said,
        answered=options.answered,
        vocab_size=_VOCAB,
    )
    runs: dict[Memory, list[SwapRun]] = {memory: [] for memory in Memory}
    with ExitStack() as engines:
        llms = {
            memory: engines.enter_context(
                launched(model, Pages.of(memory, demand=talks.demand), options, context=talks.length)
            )
            for memory in Memory
        }
        for repeat in range(options.repeats + 1):
            for memory, llm in llms.items():
                engine = llm.engine
                run = run_engine(
                    engine.frontend,
                    replace(talks, seed=repeat),
                    stats=engine.service.stats,
                    timeline=engine.timeline,
                )
                if repeat:  # the first one warms up
                    runs[memory].append(run)
    return [series for memory in Memory for series in swap_series(Path(model).name, memory, runs[memory])]


def launched(model: str, pages: Pages, options: Namespace, *, context: int) -> LLM:
    """An engine with so many pages."""
    host_bytes = 0
    if pages.host:
        files = find_model(model)
        dtype = Dtype(options.dtype)
        host_bytes = pages.host * page_bytes(model_config(files), tp=1, page_size=PAGE_SIZE, dtype=dtype)
    return LLM(
        model,
        dtype=options.dtype,
        max_model_len=context,
        max_rows=options.rows,
        max_step_tokens=128,
        page_size=PAGE_SIZE,
        num_pages=pages.device,
        host_kv_memory_bytes=host_bytes,
    )


def bench_simulator(options: Namespace) -> list[Series]:
    """Series of a configuration on the simulator's clock."""
    model = model_config_from_hf(json.loads(options.config.read_text()))
    device = SimulatedDevice.over_bus(
        model,
        roofline_cost(model, H100_SXM, tp=1, dtype=Dtype.BFLOAT16),
        dtype=Dtype.BFLOAT16,
        bus_bytes_per_s=options.bus_gb_per_s * 1e9,
    )
    talks = Talks(
        count=options.simulated_talks,
        turns=options.turns,
        said=8 * options.said,
        answered=8 * options.answered,
        vocab_size=_VOCAB,
    )
    config = SchedulerConfig(max_rows=32, max_step_tokens=512)
    subject = f"{options.config.stem.removesuffix('_config')} (H100 simulated)"
    return [
        series
        for memory in Memory
        for series in swap_series(
            subject, memory, [simulate(device, talks, Pages.of(memory, demand=talks.demand), config=config)]
        )
    ]


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    series = [each for model in options.models for each in bench_engine(model, options)]
    if options.config is not None:
        series += bench_simulator(options)
    for each in series:
        print(f"{each.subject:<44}{each.case:<11}{each.metric:<28}{each.median:>12.4g} {each.unit}")
    recording.write(
        "swap",
        series,
        note="Subjects that say so were simulated: no GPU was measured.",
        settings={"models": [Path(model).name for model in options.models]},
    )


if __name__ == "__main__":
    main()
