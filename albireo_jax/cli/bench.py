"""`albireo bench`: how fast an engine is, and where the time of its steps goes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from albireo_jax.cli import options as flags
from albireo_jax.cli.launching import launched
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.core.config import CacheConfig

if TYPE_CHECKING:
    from albireo_jax.core.plan import StepPlan

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure throughput, latency, or the host's own work per step.",
)


@bench.command()
@with_engine_flags
def throughput(
    model: flags.Model,
    *,
    requests: flags.NumRequests = 32,
    input_len: flags.InputLen = 128,
    output_len: flags.OutputLen = 128,
    temperature: flags.Temperature = 0.0,
    repeats: flags.Repeats = 3,
    engine: EngineFlags,
) -> None:
    """Tokens per second of random prompts sent to MODEL at once, and the task table.

    \b
    albireo bench throughput smollm2 --requests 16
    albireo bench throughput smollm2 --requests 16 --depth 1     without overlap
    """
    from albireo_jax.experiments.bench import Workload, bench_throughput, render_throughput

    with launched(engine.engine_config(model), measure_sampling=True) as running:
        workload = Workload(
            num_prompts=requests,
            input_len=input_len,
            output_len=output_len,
            vocab_size=running.limits.vocab_size,
            temperature=temperature,
        )
        result = bench_throughput(running.frontend, running.timeline, workload, repeats=repeats)
    typer.echo(render_throughput(result))


@bench.command()
@with_engine_flags
def latency(
    model: flags.Model,
    *,
    requests: flags.NumRequests = 1,
    input_len: flags.InputLen = 128,
    output_len: flags.OutputLen = 32,
    temperature: flags.Temperature = 0.0,
    repeats: flags.Repeats = 10,
    engine: EngineFlags,
) -> None:
    """Time to the first token and between tokens of random prompts sent to MODEL, and the task table.

    \b
    albireo bench latency smollm2
    albireo bench latency smollm2 --input-len 1024
    """
    from albireo_jax.experiments.bench import Workload, bench_latency, render_latency

    with launched(engine.engine_config(model), measure_sampling=True) as running:
        workload = Workload(
            num_prompts=requests,
            input_len=input_len,
            output_len=output_len,
            vocab_size=running.limits.vocab_size,
            temperature=temperature,
        )
        result = bench_latency(running.frontend, running.timeline, workload, repeats=repeats)
    typer.echo(render_latency(result))


@bench.command()
def host(model: flags.NoModel = None, *, rows: flags.Rows = None, steps: flags.Steps = 300) -> None:
    """Time of the host's own work per decode step (plan, pack, commit); the device computes nothing.

    \b
    albireo bench host
    albireo bench host --rows 64 --rows 256
    """
    from albireo_jax.experiments.host_bench import bench_host

    del model  # it would not change the host's work
    chosen = rows or [32, 128, 512]
    typer.echo(bench_host(chosen, pack=_packer(max(chosen)), steps=steps).render())


def _packer(max_rows: int) -> "Callable[[StepPlan], object]":
    """Packs plans of up to `max_rows` rows as the executor does."""
    from albireo_jax.runtime.batch import bucket_grid, choose_bucket, layout, pack, pack_rows

    page_size = CacheConfig().page_size
    buckets = bucket_grid(max_rows, 2 * max_rows)

    def pack_plan(plan: "StepPlan") -> object:
        bucket = choose_bucket(plan, buckets)
        forward = pack(plan, layout(bucket, page_size), padding_slot=max_rows)
        return forward, pack_rows(plan, bucket.rows, padding_slot=max_rows)

    return pack_plan
