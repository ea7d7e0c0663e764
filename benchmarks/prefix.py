"""The part of a trace's prompts that the prefix cache finds, beside the most there is to find, recorded.

The first requests of a trace whose prompts name shared blocks (Mooncake's conversations), so that what they
share is known; each block is one page of a small model. The shipped scheduler serves them as they arrive on a
simulated clock: with memory for all, with pages for a part of the demand, and with host pages behind those;
and with all requests waiting from the start. Then a real engine, if a model is given, serves each moment's
arrivals together. The demand is the number of pages that hold a prefix at the end when there is memory for
all. The aim: with memory for all, 95% of what there is to find.

    python -m benchmarks.prefix mooncake_conversation_first300.csv --model stories260k
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.launch import launch
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.lanes import Clock, Cost
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import Arrival, make_requests, read_trace, replay, scale_lengths
from benchmarks.lib.recording import Recording, script_parser

IN_ORDER, BY_MOMENT = "ideal, one after the other", "ideal, each moment's together"
NOTE = (
    "Hit rate: tokens of full prompt pages that were not computed, of all prompt tokens. The ideal counts, "
    "from the trace alone, the full pages that a prompt shares with earlier prompts from its first token on, "
    "without the page of its own last token; 'one after the other' lets a prompt find all that came before "
    "it in the trace, 'each moment's together' only what arrived earlier in time. A request waits for a page "
    "that another one computes, and finds it once that step was seen."
)


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


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("trace", type=Path, help="CSV with arrived_at, input_tokens, blocks, ...")
    made.add_argument("--requests", type=int, default=300)
    made.add_argument("--context", type=int, default=512, help="tokens of prompt and answer")
    made.add_argument("--max-output", type=int, default=32)
    made.add_argument("--page-size", type=int, default=16)
    made.add_argument("--max-rows", type=int, default=16)
    made.add_argument("--max-step-tokens", type=int, default=128)
    made.add_argument("--step-ms", type=float, default=2.0, help="simulated time of a step")
    made.add_argument("--token-us", type=float, default=20.0, help="and of each token in it")
    made.add_argument("--device-share", type=float, nargs="+", default=[1 / 3, 1 / 10], help="of the demand")
    made.add_argument("--host-share", type=float, nargs="+", default=[0.0, 1 / 3, 2 / 3, 1.0])
    made.add_argument("--model", default="", help="also serve them with this model; its vocabulary is used")
    made.add_argument("--vocab", type=int, default=512, help="without a model")
    made.add_argument("--seed", type=int, default=0)
    return made


def read_requests(options: Namespace) -> list[Request]:
    arrivals = fit_context(
        read_trace(options.trace)[: options.requests],
        block_tokens=options.page_size,
        max_model_len=options.context,
        max_output=options.max_output,
    )
    return make_requests(arrivals, vocab_size=options.vocab, seed=options.seed)


def pages_for_all(requests: Sequence[Request], options: Namespace) -> int:
    """More than all requests can fill together."""
    pages = -(-options.context // options.page_size)
    return options.max_rows * pages + sum(
        -(-(len(each.prompt_token_ids) + each.max_tokens) // options.page_size) for each in requests
    )


def simulate(
    requests: Sequence[Request], options: Namespace, *, num_pages: int, num_host_pages: int = 0
) -> SchedulerStats:
    limits = EngineLimits(
        max_model_len=options.context,
        vocab_size=options.vocab,
        num_pages=num_pages,
        page_size=options.page_size,
        num_host_pages=num_host_pages,
    )
    return replay_simulated(
        requests,
        limits,
        config=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
        cost=linear_cost(step_s=options.step_ms / 1e3, token_s=options.token_us / 1e6),
    )


def simulate_all(requests: Sequence[Request], options: Namespace) -> dict[str, SchedulerStats]:
    """The scheduler's figures by how much memory there is."""
    enough = pages_for_all(requests, options)
    ample = simulate(requests, options, num_pages=enough)
    at_once = [replace(request, arrived_s=0.0) for request in requests]
    runs = {
        "memory for all": ample,
        "memory for all, all wait from the start": simulate(at_once, options, num_pages=enough),
    }
    demand = ample.tiers.idle
    print(f"demand: {demand} pages")
    for device_share in options.device_share:
        for host_share in options.host_share:
            runs[f"pages for {device_share:.3g} of the demand, host pages for {host_share:.3g}"] = simulate(
                requests,
                options,
                num_pages=max(round(device_share * demand), -(-options.context // options.page_size)),
                num_host_pages=round(host_share * demand),
            )
    return runs


def serve(requests: Sequence[Request], options: Namespace) -> PrefixHits:
    """The hits of a real engine."""
    config = EngineConfig(
        model=options.model,
        max_model_len=options.context,
        max_logprobs=0,
        cache=CacheConfig(page_size=options.page_size, num_pages=pages_for_all(requests, options)),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    with closing(launch(config)) as engine:
        return replay_waves(requests, engine.frontend)


def hit_series(subject: str, case: str, hits: PrefixHits) -> list[Series]:
    figures = {
        ("hit rate", "of prompt tokens"): [hits.rate],
        ("cached", "tokens"): [hits.cached_tokens],
        ("prompts", "tokens"): [hits.prompt_tokens],
    }
    return series_by_metric(subject, case, figures)


def page_series(case: str, stats: SchedulerStats) -> list[Series]:
    figures = {
        ("pages of the device", ""): [stats.num_pages],
        ("pages of the host", ""): [stats.tiers.num_host_pages],
        ("pages with a prefix at the end", ""): [stats.tiers.idle],
        ("copied to the host", ""): [stats.tiers.copied_out],
        ("copied to the device", ""): [stats.tiers.copied_in],
        ("lost", ""): [stats.tiers.lost],
        ("preemptions", ""): [stats.preemptions],
    }
    return series_by_metric("simulated", case, figures)


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    requests = read_requests(options)
    ideal = ideal_hits(([request] for request in requests), page_size=options.page_size)
    found = {("trace", IN_ORDER): ideal}
    found["trace", BY_MOMENT] = ideal_hits(waves(requests), page_size=options.page_size)
    runs = simulate_all(requests, options)
    for case, stats in runs.items():
        found["simulated", case] = PrefixHits(
            prompt_tokens=stats.cache.prompt_tokens, cached_tokens=stats.cache.cached_tokens
        )
    if options.model:
        found[Path(options.model).name, "memory for all"] = serve(requests, options)
    for (subject, case), hits in found.items():
        share = hits.cached_tokens / ideal.cached_tokens if ideal.cached_tokens else 1.0
        print(f"{subject + ': ' + case:62} {hits.rate:8.4f} of prompt tokens, {share:7.4f} of the ideal")
    recording.write(
        "prefix",
        [
            *(one for (subject, case), hits in found.items() for one in hit_series(subject, case, hits)),
            *(one for case, stats in runs.items() for one in page_series(case, stats)),
        ],
        note=NOTE,
        settings={"model": Path(options.model).name},
    )


if __name__ == "__main__":
    main()
