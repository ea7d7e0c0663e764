"""Engines for tests without a model: the shipped control plane over a simulated device.

The tokenizer is made here: one token per printable ASCII character and per byte of "é", and the two
special tokens of ChatML. Its texts are legible, now and then ended by the model or stuck inside "é".
"""

import string
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from albireo_jax.core.config import SchedulerConfig, SchedulingPolicy
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.core.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from albireo_jax.core.types import Request
from albireo_jax.engine.constraint_compiler import Compiler
from albireo_jax.engine.energy import Meter, NoEnergyMeter
from albireo_jax.engine.engine_client import EngineClient, EngineFigures
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.request_metrics import MetricsSnapshot
from albireo_jax.engine.service import EngineService
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.constraints import MaskMaker
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.text.grammar.compiler import GrammarCompiler, grammar_compiler
from albireo_jax.text.grammar.mask_threads import ThreadedMaskMaker
from albireo_jax.text.tokenizer import Tokenizer
from albireo_jax.text.tokenizer_parts import TokenizerParts

START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer() -> Tokenizer:
    """104 tokens; ids of characters are in the order of `string.printable`."""
    pieces = [byte_piece(character) for character in string.printable[:96]] + ["Ã", "©", "Ċ"]
    backend = Backend(
        models.BPE(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (START, END)])
    end = backend.token_to_id(END)
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            bos_token_id=None,
            eos_token_ids=(end,),
            special_tokens={"eos_token": END},
            chat_templates={"default": CHAT_TEMPLATE},
        )
    )


def tiny_compiler(limits: EngineLimits) -> GrammarCompiler | None:
    """Compiles grammars over the tokens of `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer()
    return grammar_compiler(tokenizer, vocab_size=limits.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


def byte_piece(character: str) -> str:
    """How a byte-level vocabulary spells an ASCII character."""
    return {" ": "Ġ", "\t": "ĉ", "\n": "Ċ"}.get(character, character)


class FailingExecutor:
    """Runs plans on another executor until the one of `fail_at`, which it fails to dispatch."""

    def __init__(self, inner: Executor, *, fail_at: int) -> None:
        self._inner = inner
        self._fail_at = fail_at

    def dispatch(self, plan: StepPlan) -> StepHandle:
        if plan.step >= self._fail_at:
            raise RuntimeError(f"step {plan.step} is on fire")
        return self._inner.dispatch(plan)


NO_ENERGY = NoEnergyMeter("the device is simulated")


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A simulated engine as the HTTP app and the tests see it."""

    served_name: str
    limits: EngineLimits
    tokenizer: Tokenizer
    timeline: Timeline
    service: EngineClient
    frontend: Frontend
    energy: Meter = NO_ENERGY

    def request_totals(self) -> MetricsSnapshot:
        """Totals of the requests that passed through the frontend."""
        return self.frontend.metrics.snapshot()

    async def figures(self) -> EngineFigures:
        """The engine's measurements beside its statistics."""
        return EngineFigures(
            table=self.timeline.table(), routes=self.timeline.routes(), energy=self.energy.read()
        )

    def close(self) -> None:
        """Stop the engine thread, as an engine's own `close` does."""
        self.frontend.close()


LIMITS = EngineLimits(max_model_len=2048, vocab_size=tiny_tokenizer().vocab_size, num_pages=512, page_size=16)


def sim_loop(
    limits: EngineLimits = LIMITS,
    *,
    max_rows: int = 16,
    max_step_tokens: int = 128,
    depth: int = 2,
    shares_prefixes: bool = True,
    fail_at: int | None = None,
    clock: Callable[[], float] | None = None,
    wrap: Callable[[Executor], Executor] | None = None,
    mask_maker: MaskMaker | None = None,
    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FCFS,
) -> EngineLoop:
    """The shipped scheduler and loop on a simulated device (in `wrap`), which raises at step `fail_at`."""
    config = SchedulerConfig(
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        depth=depth,
        scheduling_policy=scheduling_policy,
    )
    sim_clock = Clock()
    executor: Executor = SimExecutor(limits, max_rows=max_rows, cost=lambda _: 1e-3, clock=sim_clock)
    if fail_at is not None:
        executor = FailingExecutor(executor, fail_at=fail_at)
    if wrap is not None:
        executor = wrap(executor)
    timeline = Timeline(clock=clock or sim_clock)
    scheduler = Scheduler(
        config, limits, shares_prefixes=shares_prefixes, mask_maker=mask_maker or ThreadedMaskMaker()
    )
    return EngineLoop(scheduler, executor, depth=depth, timeline=timeline)


def _in_process(service: EngineService) -> EngineClient:
    return service


@contextmanager
def lab(
    limits: EngineLimits = LIMITS,
    *,
    energy: Meter = NO_ENERGY,
    defaults: SamplingDefaults = NO_DEFAULTS,
    compiler: Compiler | None = None,
    connect: Callable[[EngineService], EngineClient] = _in_process,
    **loop_options: Any,
) -> Generator[Lab, None, None]:
    """A running simulated engine, called as `connect` says."""
    loop = sim_loop(limits, **loop_options)
    tokenizer = tiny_tokenizer()
    service = EngineService(loop, limits, compiler=compiler or tiny_compiler(limits))
    client = connect(service)
    frontend = Frontend(
        client,
        tokenizer,
        limits=limits,
        eos_token_ids=tokenizer.eos_token_ids,
        clock=loop.timeline.clock,
        defaults=defaults,
    )
    try:
        yield Lab(
            served_name="tiny",
            limits=limits,
            tokenizer=tokenizer,
            timeline=loop.timeline,
            service=client,
            frontend=frontend,
            energy=energy,
        )
    finally:
        frontend.close()


def tokens_alone(requests: Sequence[Request], limits: EngineLimits = LIMITS) -> dict[str, list[int]]:
    """The tokens of each request when it has the synchronous engine to itself."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        loop = sim_loop(limits, depth=1)
        loop.scheduler.add(request)
        tokens[request.request_id] = []
        while loop.has_work:
            tokens[request.request_id] += [
                output.token_id for output in loop.step() if output.token_id is not None
            ]
    return tokens
