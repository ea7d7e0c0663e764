"""`albireo sweep`: at which tensor-parallel degree a number of GPUs serves most."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from albireo_jax.cli import options as flags
from albireo_jax.cli.launching import needs_extra
from albireo_jax.cli.options import with_flags
from albireo_jax.core.config import Dtype
from albireo_jax.core.model_files import find_model

if TYPE_CHECKING:
    from albireo_jax.measure.loads import OfferedLoad
    from albireo_jax.sweep.sweep_settings import SweepSettings

_FAILED = 1
_DEFAULT_BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFlags:
    """Flags of a sweep, in the order in which help shows them."""

    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of the cluster.")]
    tp: Annotated[
        str, typer.Option(metavar="T,T,...", help="Degrees to measure; t has N/t replicas of t GPUs.")
    ] = "1,2,4,8"
    batch_per_gpu: Annotated[
        int, typer.Option(metavar="N", help="Requests per GPU, all at once; also the rows of a step per GPU.")
    ] = 32
    input_len: flags.InputLen = 128
    output_len: flags.OutputLen = 128
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Offer the requests of a trace at their times.", show_default=False
        ),
    ] = None
    scale: Annotated[float, typer.Option(metavar="X", help="Lengths of a trace, times X.")] = 1.0
    rate_scale: Annotated[float, typer.Option(metavar="X", help="Rate of a trace, times X.")] = 1.0
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Offer X requests per second to the cluster, at random moments.",
            show_default=False,
        ),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Requests with --rate (default: {_DEFAULT_BATCHES} batches), or the first of a trace.",
            show_default=False,
        ),
    ] = None
    virtual_devices: Annotated[
        int, typer.Option(metavar="N", help="Let the CPU stand for N devices; 0: use real ones.")
    ] = 0
    one_replica: Annotated[
        bool | None,
        typer.Option(
            "--one-replica/--replicas-together",
            help="Measure one replica of each t with its share of the load, and multiply; or all side by side"
            ". Default: side by side on GPUs, one on virtual devices.",
            show_default=False,
        ),
    ] = None
    interleave: Annotated[
        bool | None,
        typer.Option(
            "--interleave/--no-interleave",
            help="Measure the variants in turn in one process, or one after the other, each with all memory. "
            "Default: in turn on virtual devices only.",
            show_default=False,
        ),
    ] = None
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory per GPU, for KV pages and the rule 4M/C. Default: what the GPUs have.",
            show_default=False,
        ),
    ] = None
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="float32|bfloat16", help="Default: bfloat16 on GPUs, float32 on CPUs.", show_default=False
        ),
    ] = None
    max_step_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens computed per step.")] = 512
    page_size: Annotated[int, typer.Option(metavar="N", help="Tokens per page.")] = 16
    temperature: flags.Temperature = 0.8
    top_p: flags.TopP = 0.95
    repeats: flags.Repeats = 3
    warmups: Annotated[int, typer.Option(metavar="N", help="Runs of each variant that do not count.")] = 1
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts, arrivals and sampling.")] = 0

    def load(self) -> "OfferedLoad":
        """The load that is offered to the cluster; raises ValueError for flags that contradict each other."""
        from albireo_jax.measure.loads import FixedBatch, PoissonLoad, TraceLoad

        if self.trace is not None and self.rate is not None:
            raise ValueError(
                "--rate and --trace are two loads, give one of them; --rate-scale changes the rate of a trace"
            )
        if self.trace is not None:
            return TraceLoad(
                path=self.trace, scale=self.scale, rate_scale=self.rate_scale, count=self.requests
            )
        if (self.scale, self.rate_scale) != (1.0, 1.0):
            raise ValueError("--scale and --rate-scale change a trace; give one with --trace")
        if self.rate is not None:
            return PoissonLoad(
                rate_per_s=self.rate,
                count=self.requests or _DEFAULT_BATCHES * self.batch_per_gpu * self.gpus,
                input_len=self.input_len,
                output_len=self.output_len,
            )
        if self.requests is not None:
            raise ValueError("--requests goes with --rate or --trace; a batch has --batch-per-gpu")
        return FixedBatch(per_gpu=self.batch_per_gpu, input_len=self.input_len, output_len=self.output_len)

    def settings(self, model: str) -> "SweepSettings":
        """The settings of a sweep of `model`; raises ValueError for values out of range."""
        from albireo_jax.sweep.sweep_settings import SweepSettings

        virtual = self.virtual_devices > 0
        return SweepSettings(
            model=model,
            gpus=self.gpus,
            degrees=_degrees(self.tp),
            load=self.load(),
            one_replica=virtual if self.one_replica is None else self.one_replica,
            interleaved=virtual if self.interleave is None else self.interleave,
            virtual_devices=self.virtual_devices,
            dtype=self.dtype,
            gpu_memory_bytes=None if self.gpu_memory is None else _bytes(self.gpu_memory),
            rows_per_gpu=self.batch_per_gpu,
            max_step_tokens=self.max_step_tokens,
            page_size=self.page_size,
            repeats=self.repeats,
            warmups=self.warmups,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


@with_flags(SweepFlags, argument="asked")
def sweep(
    model: flags.Model,
    *,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the results; what it holds is not run again."),
    ] = Path("sweep"),
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write a record of all samples into this folder.", show_default=False
        ),
    ] = None,
    asked: SweepFlags,
) -> None:
    """Measure at which tensor-parallel degree N GPUs serve most of MODEL, and what each mechanism gains.

    For each degree t, N/t replicas get the same load: synchronously, overlapped, and overlapped with sharded
    sampling. The same command again goes on with a sweep that was interrupted.

    \b
    albireo sweep /models/Qwen2.5-32B --gpus 8
    albireo sweep /models/Qwen2.5-32B --gpus 8 --tp 2,4 --trace azure.csv --rate-scale 2
    albireo sweep /models/small --gpus 8 --virtual-devices 8 --batch-per-gpu 4     without a GPU
    """
    find_model(model)  # tells of a wrong name before JAX is imported
    settings = asked.settings(model)
    with needs_extra("experiments"):
        from albireo_jax.sweep.sweep_page import write_report
    from albireo_jax.sweep.sweep_run import check_sweep, run_sweep
    from albireo_jax.sweep.sweep_tables import print_summary, record_sweep

    done = run_sweep(check_sweep(settings), out, tell=lambda line: typer.echo(line, err=True))
    page = write_report(done, out)
    print_summary(done.summary())
    typer.echo(f"page: {page}")
    if record is not None:
        typer.echo(f"record: {record_sweep(done, record)}")
    if done.failures:
        raise typer.Exit(_FAILED)


def _degrees(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"tp must be degrees apart by commas, such as 1,2,4, got {text!r}") from None


def _bytes(gib: float) -> int:
    if not math.isfinite(gib) or gib <= 0:
        raise ValueError(f"gpu_memory must be a finite number of GiB above 0, got {gib:g}")
    return int(gib * 2**30)
