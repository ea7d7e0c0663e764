"""`albireo bench`: how fast an engine is, and where the time of its steps goes."""

import typer

from albireo_jax.cli import options as flags
from albireo_jax.cli.launching import launched
from albireo_jax.cli.options import EngineFlags, with_engine_flags

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
    from albireo_jax.measure.throughput import BenchWorkload, bench_throughput, render_throughput

    with launched(engine.engine_config(model), measure_sampling=True) as running:
        workload = BenchWorkload(
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
    from albireo_jax.measure.throughput import BenchWorkload, bench_latency, render_latency

    with launched(engine.engine_config(model), measure_sampling=True) as running:
        workload = BenchWorkload(
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
    from albireo_jax.measure.host_work import bench_host, plan_packer

    del model  # it would not change the host's work
    chosen = rows or [32, 128, 512]
    typer.echo(bench_host(chosen, pack=plan_packer(max(chosen)), steps=steps).render())
