"""`albireo calibrate`: the times of a model's steps on this machine, for `albireo plan`."""

from pathlib import Path
from typing import Annotated

import typer

from albireo_jax.cli.number_lists import comma_separated
from albireo_jax.core.config import Dtype
from albireo_jax.sim.planning.calibration import write_calibration

_Model = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", exists=True, help="A config.json, or a folder with one; weights are random."
    ),
]


def calibrate(
    model: _Model,
    *,
    output: Annotated[Path, typer.Option(metavar="FILE.json", help="Where to write the calibration.")],
    tp: Annotated[str, typer.Option(metavar="T,T,...", help="Degrees to measure.")] = "1,2,4",
    shard_shaped: Annotated[
        bool, typer.Option("--shard-shaped", help="One device runs what one of t ranks has, for GPUs.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="float32|bfloat16", help="Default: bfloat16 on GPUs, float32 on CPUs.", show_default=False
        ),
    ] = None,
    max_rows: Annotated[int, typer.Option(metavar="N", help="Most rows of a step.")] = 16,
    max_step_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of a step.")] = 256,
    max_model_len: Annotated[int, typer.Option(metavar="N", help="Longest sequence.")] = 1024,
    page_size: Annotated[int, typer.Option(metavar="N", help="Tokens per page.")] = 16,
    depths: Annotated[str, typer.Option(metavar="N,N,...", help="Steps in flight, each measured.")] = "1,2",
    repeats: Annotated[int, typer.Option(metavar="N", help="Times that all loads run.")] = 2,
) -> None:
    """Measure the steps of a model with random weights, for `albireo plan --calibration`.

    \b
    albireo calibrate config.json --shard-shaped --tp 1,2,4,8 --output llama8b-h100.json
    albireo calibrate MODEL_FOLDER --tp 1,2,4 --output model-cpu.json            virtual devices of a CPU
    """
    from albireo_jax.measure.calibrate import CalibrationSettings, render_calibration
    from albireo_jax.measure.calibrate import calibrate as measured

    settings = CalibrationSettings(
        model=model,
        degrees=comma_separated("tp", tp),
        shard_shaped=shard_shaped,
        dtype=dtype,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        max_model_len=max_model_len,
        page_size=page_size,
        depths=comma_separated("depths", depths),
        repeats=repeats,
    )
    calibration = measured(settings)
    write_calibration(calibration, output)
    typer.echo(render_calibration(calibration))
    typer.echo(output)
