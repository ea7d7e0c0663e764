"""`albireo report`: where the time of an engine's steps goes, and what more devices would bring."""

from pathlib import Path
from typing import Annotated

import typer

from albireo_jax.cli import options as flags
from albireo_jax.cli.launching import needs_extra, prepared
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.core.model_files import find_model

_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="smollm2 (built in), a Hugging Face folder, a saved checkpoint, or a .gguf file.",
        show_default=False,
    ),
]
_Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE.csv",
        help="Offer the first --requests of a trace at their times instead of random prompts at once.",
        show_default=False,
    ),
]
_Scale = Annotated[
    float, typer.Option("--scale", metavar="X", help="Lengths of the trace's requests, times X.")
]
_Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where to write report.json, .html and trace.json.")
]
_From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="report.json",
        help="Show an earlier report again instead of running an engine.",
        show_default=False,
    ),
]


@with_engine_flags
def report(
    model: _Model = None,
    *,
    requests: flags.NumRequests = 32,
    input_len: flags.InputLen = 128,
    output_len: flags.OutputLen = 128,
    trace: _Trace = None,
    scale: _Scale = 1.0,
    temperature: flags.Temperature = 0.8,
    top_p: flags.TopP = 0.95,
    out: _Out = Path("report"),
    earlier: _From = None,
    engine: EngineFlags,
) -> None:
    """Run requests on MODEL and report where the time of each step went: Amdahl's law, measured.

    \b
    albireo report smollm2 --out report
    albireo report smollm2 --depth 1 --out report-synchronous     without overlap
    albireo report smollm2 --trace azure.csv --scale 0.1 --max-model-len 1024
    albireo report --from report/report.json --out elsewhere
    """
    with needs_extra("experiments"):
        from albireo_jax.report.report_page import terminal_text, write_report
    from albireo_jax.report.amdahl import read_report
    from albireo_jax.report.report_load import ReportLoad

    if earlier is not None and model is None:
        found, spans = read_report(earlier), ()
    elif earlier is None and model is not None:
        load = ReportLoad(
            requests=requests,
            input_len=input_len,
            output_len=output_len,
            trace=trace,
            scale=scale,
            temperature=temperature,
            top_p=top_p,
        )
        arrivals = load.arrivals()  # tells of a wrong load at once
        ready = prepared(engine.engine_config(model))
        from albireo_jax.report.measured_run import run_report  # imports JAX

        run = run_report(ready, load, arrivals, model=find_model(model).name)
        found, spans = run.report, run.spans
    else:
        raise ValueError("name a MODEL to run or, with --from, an earlier report, and not both")
    paths = write_report(found, out, spans=spans)
    typer.echo(terminal_text(found))
    typer.echo(f"\nwritten: {', '.join(str(path) for path in paths)}", err=True)
