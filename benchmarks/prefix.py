"""How much of a trace's prompts the prefix cache finds, beside how much there is to find, recorded.

The first requests of a trace whose prompts name shared blocks (Mooncake's conversations), each block one page
of a small model. The shipped scheduler serves them as they arrive on a simulated clock: with memory for all,
with pages for a part of the demand, and with host pages behind those; and with all requests waiting from the
start. Then a real engine, if a model is given, serves each moment's arrivals together. The demand is
the number of pages that hold a prefix at the end when there is memory for all. The aim: with memory
for all, 95% of what there is to find.

    python benchmarks/prefix.py ../shared/data/traces/mooncake_conversation_first300.csv \\
        --model ../shared/data/models/stories260k
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request
from albireo_jax.launch import launch
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.workload import make_requests, read_trace
from benchmarks.lib.prefix_replay import (
    PrefixHits,
    fit_context,
    ideal_hits,
    replay_simulated,
    replay_waves,
    waves,
)

ROOT = Path(__file__).resolve().parents[1]
IN_ORDER, BY_MOMENT = "ideal, one after the other", "ideal, each moment's together"
NOTE = (
    "Hit rate: tokens of full prompt pages that were not computed, of all prompt tokens. The ideal counts, "
    "from the trace alone, the full pages that a prompt shares with earlier prompts from its first token on, "
    "without the page of its own last token; 'one after the other' lets a prompt find all that came before "
    "it in the trace, 'each moment's together' only what arrived earlier in time. A request waits for a page "
    "that another one computes, and finds it once that step was seen."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="CSV with arrived_at, input_tokens, blocks, ...")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--context", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument("--max-output", type=int, default=32)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=2.0, help="simulated time of a step")
    parser.add_argument("--token-us", type=float, default=20.0, help="and of each token in it")
    parser.add_argument(
        "--device-share", type=float, nargs="+", default=[1 / 3, 1 / 10], help="of the demand"
    )
    parser.add_argument("--host-share", type=float, nargs="+", default=[0.0, 1 / 3, 2 / 3, 1.0])
    parser.add_argument("--model", default="", help="also serve them with this model; its vocabulary is used")
    parser.add_argument("--vocab", type=int, default=512, help="without a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def read_requests(options: argparse.Namespace) -> list[Request]:
    arrivals = fit_context(
        read_trace(options.trace)[: options.requests],
        block_tokens=options.page_size,
        max_model_len=options.context,
        max_output=options.max_output,
    )
    return make_requests(arrivals, vocab_size=options.vocab, seed=options.seed)


def pages_for_all(requests: Sequence[Request], options: argparse.Namespace) -> int:
    """More than all requests can fill together."""
    pages = -(-options.context // options.page_size)
    return options.max_rows * pages + sum(
        -(-(len(each.prompt_token_ids) + each.max_tokens) // options.page_size) for each in requests
    )


def simulate(
    requests: Sequence[Request], options: argparse.Namespace, *, num_pages: int, num_host_pages: int = 0
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


def simulate_all(requests: Sequence[Request], options: argparse.Namespace) -> dict[str, SchedulerStats]:
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


def serve(requests: Sequence[Request], options: argparse.Namespace) -> PrefixHits:
    """What a real engine finds."""
    config = EngineConfig(
        model=options.model,
        max_model_len=options.context,
        max_logprobs=0,
        cache=CacheConfig(page_size=options.page_size, num_pages=pages_for_all(requests, options)),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    engine = launch(config)
    try:
        return replay_waves(requests, engine.frontend)
    finally:
        engine.close()


def hit_series(subject: str, case: str, hits: PrefixHits) -> list[Series]:
    figures = {
        ("hit rate", "of prompt tokens"): hits.rate,
        ("cached", "tokens"): hits.cached_tokens,
        ("prompts", "tokens"): hits.prompt_tokens,
    }
    return [
        Series(subject=subject, case=case, metric=metric, unit=unit, samples=(float(value),))
        for (metric, unit), value in figures.items()
    ]


def tier_series(case: str, stats: SchedulerStats) -> list[Series]:
    figures = {
        "pages of the device": stats.num_pages,
        "pages of the host": stats.tiers.num_host_pages,
        "pages with a prefix at the end": stats.tiers.idle,
        "copied to the host": stats.tiers.copied_out,
        "copied to the device": stats.tiers.copied_in,
        "lost": stats.tiers.lost,
        "preemptions": stats.preemptions,
    }
    return [
        Series(subject="simulated", case=case, metric=metric, unit="", samples=(float(value),))
        for metric, value in figures.items()
    ]


def line(case: str, hits: PrefixHits, ideal: PrefixHits) -> str:
    share = hits.cached_tokens / ideal.cached_tokens if ideal.cached_tokens else 1.0
    return f"{case:62} {hits.rate:8.4f} of prompt tokens, {share:7.4f} of the ideal"


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
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
        print(line(f"{subject}: {case}", hits, ideal))
    record = Record(
        name="prefix",
        device=cpu_device(),
        settings={
            **{
                name: value
                for name, value in vars(options).items()
                if name not in ("output", "trace", "model")
            },
            "trace": options.trace.name,
            "model": Path(options.model).name,
        },
        series=[
            *(one for (subject, case), hits in found.items() for one in hit_series(subject, case, hits)),
            *(one for case, stats in runs.items() for one in tier_series(case, stats)),
        ],
        note=NOTE,
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
