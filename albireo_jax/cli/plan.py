"""`albireo plan`: which tensor-parallel degree and how many replicas to serve a model with, on N GPUs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from albireo_jax.cli.number_lists import comma_separated
from albireo_jax.cli.options import with_flags
from albireo_jax.core.config import MEMORY_SHARE, Dtype, KvDtype, Quantization, SamplingMode
from albireo_jax.core.hf_config import model_config_from_hf, read_hf_config
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import find_model

if TYPE_CHECKING:
    from albireo_jax.sim.planning.plan_sizes import Question
    from albireo_jax.sim.planning.planner import Plan, StepModels
    from albireo_jax.sim.step_model import StepModel

_WIDTH = 160  # of a table that goes to a file

_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A config.json is enough; or a model as for `albireo serve`."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """Flags of a plan, in the order in which help shows them."""

    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of the cluster.")]
    ttft: Annotated[float, typer.Option(metavar="MS", help="Target: milliseconds to the first token.")]
    tpot: Annotated[float, typer.Option(metavar="MS", help="Target: milliseconds per later token.")]
    trace: Annotated[Path, typer.Option(metavar="FILE.csv", help="Requests to plan for: arrivals, lengths.")]
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, h200, b200, a100 or a100-pcie.")] = "h100"
    attainment: Annotated[
        float, typer.Option(metavar="X", help="Share of the requests that must meet both targets.")
    ] = 0.9
    requests: Annotated[
        int, typer.Option(metavar="N", help="Requests of the trace per replica; more take longer.")
    ] = 1000
    rows: Annotated[str, typer.Option(metavar="N,N,...", help="Values of --max-rows to try.")] = (
        "32,64,128,256"
    )
    step_tokens: Annotated[
        str, typer.Option(metavar="N,N,...", help="Values of --max-step-tokens to try.")
    ] = "512,1024,2048,4096"
    depth: Annotated[
        int, typer.Option(metavar="N", help="Steps in flight: 1 plans and computes in turn.")
    ] = 2
    sampling: Annotated[
        SamplingMode, typer.Option(metavar="sharded|replicated", help="Where rows are sampled.")
    ] = SamplingMode.SHARDED
    dtype: Annotated[Dtype, typer.Option(metavar="float32|bfloat16", help="Of weights and activations.")] = (
        Dtype.BFLOAT16
    )
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            metavar="|".join(Quantization),
            help="Of the layers' matrices, in one byte a number. Default: as --dtype.",
            show_default=False,
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvDtype, typer.Option(metavar="|".join(KvDtype), help="Of cached keys and values.")
    ] = KvDtype.AUTO
    page_size: Annotated[int, typer.Option(metavar="N", help="Tokens per page.")] = 16
    memory_share: Annotated[
        float, typer.Option(metavar="X", help="Share of a GPU's memory for weights and pages.")
    ] = MEMORY_SHARE
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Step and host times that `albireo calibrate` measured. Default: a roofline.",
            show_default=False,
        ),
    ] = None
    host_record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Host times of a record of benchmarks/host_steps.py. Default: those of the calibration, "
            "or what this engine took on an AMD EPYC.",
            show_default=False,
        ),
    ] = None
    flops_efficiency: Annotated[
        float, typer.Option(metavar="X", help="Share of the data sheet's arithmetic that is reached.")
    ] = 0.6
    memory_efficiency: Annotated[
        float, typer.Option(metavar="X", help="Share of the data sheet's memory bandwidth that is reached.")
    ] = 0.75


@with_flags(PlanFlags, argument="asked")
def plan(
    model: _Model,
    *,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the plan as JSON.", show_default=False),
    ] = None,
    emit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Also write what `albireo serve MODEL --config FILE.yaml` takes.",
            show_default=False,
        ),
    ] = None,
    asked: PlanFlags,
) -> None:
    """Find the plan of N GPUs that serves most requests of a trace for MODEL within latency targets.

    The scheduler that serves runs on a simulated clock; no GPU is needed, and none is measured.

    \b
    albireo plan config.json --gpus 8 --ttft 500 --tpot 30 --trace azure.csv
    albireo plan config.json --gpus 8 --ttft 500 --tpot 30 --trace azure.csv --emit engine.yaml
    albireo plan config.json --gpus 4 --gpu a100 --ttft 2000 --tpot 50 --trace azure.csv --depth 1
    """
    from albireo_jax.sim.planning.plan_report import as_json, config_yaml, lines
    from albireo_jax.sim.planning.planner import make_plan

    for path in filter(None, (json_file, emit)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    question, steps_at = _question(model, asked)
    answer = _with_progress(lambda tell: make_plan(question, steps_at, progress=tell))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(_table(answer))
    for line in lines(answer):
        typer.echo(line)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(answer), indent=1) + "\n")
    if emit is not None:
        emit.write_text(config_yaml(answer))


def _question(name: str, asked: PlanFlags) -> "tuple[Question, StepModels]":
    """The question of the flags, and the step times of its replicas."""
    from albireo_jax.sim.gpus import find_gpu
    from albireo_jax.sim.planning.plan_sizes import Question
    from albireo_jax.sim.replica import Targets
    from albireo_jax.sim.workload import read_trace

    question = Question(
        name=_short_name(name),
        model=replace(_model(name), quantization=asked.quantization),
        gpu=find_gpu(asked.gpu),
        num_gpus=asked.gpus,
        targets=Targets(ttft_s=asked.ttft / 1e3, tpot_s=asked.tpot / 1e3, attainment=asked.attainment),
        arrivals=read_trace(asked.trace),
        depth=asked.depth,
        sampling=asked.sampling,
        dtype=asked.dtype,
        kv_dtype=asked.kv_cache_dtype,
        page_size=asked.page_size,
        memory_share=asked.memory_share,
        rows=comma_separated("rows", asked.rows),
        step_tokens=comma_separated("step-tokens", asked.step_tokens),
        requests_per_replica=asked.requests,
    )
    return _measured(question, asked) if asked.calibration else (question, _assumed(question, asked))


def _measured(question: "Question", asked: PlanFlags) -> "tuple[Question, StepModels]":
    """The question about degrees that were measured, and their steps."""
    from albireo_jax.sim.host import read_host_terms
    from albireo_jax.sim.planning.calibration import read_calibration
    from albireo_jax.sim.step_model import calibrated_model, measured_limits

    path = asked.calibration
    if path is None or not path.is_file():
        raise ValueError(f"there is no calibration {path}; `albireo calibrate` makes one")
    if asked.quantization is not None:
        raise ValueError(f"quantization {asked.quantization} cannot be planned from steps of float weights")
    calibration = read_calibration(path)
    host = None if asked.host_record is None else read_host_terms(asked.host_record)

    def steps_at(tp: int) -> "StepModel":
        return calibrated_model(
            calibration,
            question.model,
            question.gpu,
            tp=tp,
            depth=question.depth,
            mode=question.sampling,
            host=host,
        )

    limits = measured_limits(calibration, depth=question.depth)
    rows = tuple(rows for rows in question.rows if rows <= limits.rows)
    step_tokens = tuple(tokens for tokens in question.step_tokens if tokens <= limits.tokens)
    if not rows or not step_tokens:
        raise ValueError(
            f"{path} has steps of at most {limits.rows} rows and {limits.tokens} tokens; give --rows and "
            f"--step-tokens that are no larger"
        )
    degrees = tuple(shard.tp for shard in calibration.shards)
    return replace(question, degrees=degrees, rows=rows, step_tokens=step_tokens), steps_at


def _assumed(question: "Question", asked: PlanFlags) -> "StepModels":
    """Steps by the roofline."""
    from albireo_jax.sim.host import OWN_HOST, read_host_terms
    from albireo_jax.sim.step_model import Efficiency, roofline_model

    host = OWN_HOST if asked.host_record is None else read_host_terms(asked.host_record)
    efficiency = Efficiency(flops=asked.flops_efficiency, memory=asked.memory_efficiency)

    def steps_at(tp: int) -> "StepModel":
        return roofline_model(
            question.model,
            question.gpu,
            tp=tp,
            host=host,
            mode=question.sampling,
            dtype=question.dtype,
            kv_dtype=question.kv_dtype,
            efficiency=efficiency,
        )

    return steps_at


def _model(name: str) -> ModelConfig:
    """The shape of a model; only its configuration need be there."""
    path = Path(name).expanduser()
    if path.suffix == ".json":
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a config.json: {error}") from error
        return model_config_from_hf(contents)
    if (path / "config.json").is_file():
        return read_hf_config(path)
    files = find_model(name)
    from albireo_jax.models.registry import model_config  # takes JAX, which a config.json does without

    return model_config(files)


def _short_name(name: str) -> str:
    path = Path(name)
    if path.name == "config.json":
        return path.resolve().parent.name
    return path.stem.removesuffix("_config") if path.suffix else path.name


def _with_progress(make: "Callable[[Callable[[str], None]], Plan]") -> "Plan":
    """A line on a terminal that says what is simulated."""
    console = Console(stderr=True)
    with console.status("reading the trace") as status:
        return make(status.update)


def _table(answer: "Plan") -> Table:
    from albireo_jax.sim.planning.plan_report import rows

    table = Table(title=f"{answer.question.name}: {answer.steps.label}", title_justify="left")
    for column in ("t", "replicas", "tokens held", "rows", "step tokens", "requests/s", "tokens/s"):
        table.add_column(column, justify="right")
    for column in ("TTFT ms", "TPOT ms", "busy", "host exposed µs"):
        table.add_column(column, justify="right")
    table.add_column("figures")
    for row in rows(answer):
        table.add_row(
            f"{row.tp}",
            _shown(row.replicas, "d"),
            _shown(row.tokens_held, ",d"),
            _shown(row.max_rows, "d"),
            _shown(row.max_step_tokens, "d"),
            _shown(row.requests_per_s, ".3g"),
            _shown(row.output_tokens_per_s, ",.0f"),
            _shown(row.ttft_s, ".4g", factor=1e3),
            _shown(row.tpot_s, ".4g", factor=1e3),
            _shown(row.busy_share, ".0%"),
            _shown(row.exposed_host_s, ".0f", factor=1e6),
            row.label,
            style="bold" if row.tp == answer.best.degree.tp else None,
        )
    return table


def _shown(value: float | None, form: str, *, factor: int | float = 1) -> str:
    return "" if value is None else format(value * factor, form)
