"""Replays of a trace that count the prompt tokens found in the prefix cache, beside the most there are.

The prompts of a trace name the blocks of tokens that they are made of, so that what they share is known.
`fit_context` makes them small enough for a small model; `ideal_hits` counts what a cache could find at best,
from the prompts alone; the replays send them to the shipped scheduler, on a simulated device or a real one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sim.lanes import Clock, Cost
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import Arrival, replay, scale_lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHits:
    """Tokens of all prompts, and those of them that need not be computed."""

    prompt_tokens: int
    cached_tokens: int

    @property
    def rate(self) -> float:
        """The part that need not be computed."""
        return self.cached_tokens / self.prompt_tokens


def fit_context(
    arrivals: Sequence[Arrival], *, block_tokens: int, max_model_len: int, max_output: int
) -> list[Arrival]:
    """The same arrivals with blocks of `block_tokens`, prompts and answers scaled alike and then cut.

    Answers have `max_output` tokens at most, and prompts what is left of `max_model_len` beside them. Raises
    ValueError if the blocks differ in size, or nothing is left for prompts.
    """
    sizes = {arrival.block_size for arrival in arrivals}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"all prompts must have blocks of one size, got sizes {sorted(sizes)}")
    max_input = max_model_len - max_output
    if max_input < 1:
        raise ValueError(f"answers of {max_output} tokens leave no prompt in {max_model_len}")
    return [
        replace(
            scaled,
            input_tokens=min(scaled.input_tokens, max_input),
            output_tokens=min(scaled.output_tokens, max_output),
            block_ids=scaled.block_ids[: -(-max_input // block_tokens)],
        )
        for scaled in scale_lengths(arrivals, block_tokens / sizes.pop())
    ]


def waves(requests: Iterable[Request]) -> list[list[Request]]:
    """Requests, in order of arrival, together with those that arrive at the same moment."""
    return [list(wave) for _, wave in groupby(requests, key=lambda request: request.arrived_s)]


def ideal_hits(waves: Iterable[Sequence[Request]], *, page_size: int) -> PrefixHits:
    """The hits of an endless cache in which a prompt can be found as soon as the next wave comes.

    A prompt finds as many full pages as it begins with like a prompt of an earlier wave; never the page of
    its own last token, which is always computed. With each request a wave of its own, this is the most that
    any cache finds that serves them in their order. Answers are not counted: a replay makes up its own, which
    no later prompt repeats.
    """
    prompt_tokens = cached_tokens = 0
    known: set[tuple[int, ...]] = set()
    for wave in waves:
        prompts = [tuple(request.prompt_token_ids.tolist()) for request in wave]
        prompt_tokens += sum(map(len, prompts))
        cached_tokens += page_size * sum(_num_known(prompt, known, page_size=page_size) for prompt in prompts)
        for prompt in prompts:
            known.update(prompt[:end] for end in range(page_size, len(prompt) + 1, page_size))
    return PrefixHits(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)


def replay_simulated(
    requests: Sequence[Request], limits: EngineLimits, *, config: SchedulerConfig, cost: Cost
) -> SchedulerStats:
    """The scheduler's figures after all requests came as they arrive on a simulated clock."""
    clock = Clock()
    executor = SimExecutor(limits, max_rows=config.max_rows, cost=cost, clock=clock)
    scheduler = Scheduler(config, limits)
    loop = EngineLoop(scheduler, executor, depth=config.depth, timeline=Timeline(clock=clock))
    outputs = replay(loop, requests, clock=clock)
    _check_complete(sum(timed.output.token_id is not None for timed in outputs), requests)
    return scheduler.stats()


def replay_waves(requests: Sequence[Request], frontend: Frontend, *, cache_salt: str = "") -> PrefixHits:
    """The hits of an engine to which the requests of a wave are sent together, each wave after the last."""
    prompt_tokens = cached_tokens = num_tokens = 0
    for wave in waves(requests):
        params = [SamplingParams(max_tokens=each.max_tokens, temperature=0, ignore_eos=True) for each in wave]
        prompts = [tuple(request.prompt_token_ids.tolist()) for request in wave]
        answers = frontend.generate(prompts, params, cache_salt=cache_salt)
        prompt_tokens += sum(map(len, prompts))
        cached_tokens += sum(answer.cached_tokens for answer in answers)
        num_tokens += sum(len(answer.token_ids) for answer in answers)
    _check_complete(num_tokens, requests)
    return PrefixHits(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)


def _num_known(prompt: tuple[int, ...], known: set[tuple[int, ...]], *, page_size: int) -> int:
    """How many pages of a prompt, from the first on, are the ends of known prefixes."""
    pages = (len(prompt) - 1) // page_size
    return next((page for page in range(pages) if prompt[: (page + 1) * page_size] not in known), pages)


def _check_complete(num_tokens: int, requests: Sequence[Request]) -> None:
    expected = sum(request.max_tokens for request in requests)
    if num_tokens != expected:
        raise RuntimeError(f"{num_tokens} tokens came, {expected} were asked for")
