"""The t_e of models of 7B to 72B on 8 x 80 GB: synchronous, overlapped, and with sharded sampling.

The paper's Figure 14 (arXiv 2606.01927), simulated: at t = 1, 2, 4, 8 each of N/t replicas has 32 rows per
GPU and all its requests at once. Thrice, with different terms of a step, each stated in the record:

    paper           the host and sampling of vLLM 0.11.2 as the paper measured them; the roofline's forward
    paper, its T3   the same; the forward pass slowed until Qwen2.5-32B takes the paper's 21 ms at t=4
    own             this engine's host times, newest record, and its sampler

Prints for each model the t_e beside the paper's and 4 M / C, and what part of a step makes the difference.
Nothing is measured on a GPU. Writes a record whose name begins with `simulated-`, and plots beside it.

    python -m benchmarks.studies.simulated_te --configs DIR
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albireo_jax.core.config import SamplingMode, SchedulerConfig
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import Request
from albireo_jax.measure.figures import BarSegment, Line, Mark, grouped_bars, line_figure, svg_file
from albireo_jax.measure.records import Series
from albireo_jax.sim.gpus import Gpu, find_gpu
from albireo_jax.sim.host import NO_HOST, VLLM_0_11_2, HostTerms, read_host_terms
from albireo_jax.sim.lanes import Cost
from albireo_jax.sim.planning.plan_sizes import Degree, Question, fit, read_workload
from albireo_jax.sim.replica import Replica, run
from albireo_jax.sim.step_model import VLLM_SAMPLER, SamplerTerms, StepModel, roofline_model
from albireo_jax.sim.workload import Arrival, make_requests
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.lib.plain_plans import plain_plan
from benchmarks.lib.recording import RESULTS, Recording
from benchmarks.lib.simulated import (
    ANY_LATENCY,
    NOT_MEASURED,
    add_models,
    model_named,
    paper_tp,
    simulated_gpus,
    simulated_parser,
    simulated_series,
)

MODELS = (
    "Llama-2-7b-hf",
    "Qwen2.5-7B",
    "Llama-2-13b-hf",
    "Qwen2.5-14B",
    "Qwen2.5-32B",
    "Meta-Llama-3.1-70B",
    "Qwen2.5-72B",
)
PAPER_MODEL, PAPER_TP, PAPER_ROWS, PAPER_FORWARD_S = "Qwen2.5-32B", 4, 128, 21e-3
ROWS_PER_GPU = 32
_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """Terms of a step: the host, the sampler (None: this project's), and the roofline's forward, slowed."""

    name: str
    host: HostTerms
    sampler: SamplerTerms | None = None
    forward_factor: float = 1.0

    def steps(self, model: ModelConfig, gpu: Gpu, *, tp: int, mode: SamplingMode) -> StepModel:
        """The steps of a replica."""
        steps = roofline_model(model, gpu, tp=tp, host=self.host, mode=mode, sampler=self.sampler)
        return replace(steps, forward=_slower(steps.forward, self.forward_factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceLoad:
    """The load: prompts and answers of these lengths, `ROWS_PER_GPU` requests for each GPU at once."""

    input_tokens: int
    output_tokens: int

    def requests(self, *, rows: int, vocab_size: int) -> list[Request]:
        """The requests of a replica."""
        arrival = Arrival(arrived_s=0.0, input_tokens=self.input_tokens, output_tokens=self.output_tokens)
        return make_requests([arrival] * rows, vocab_size=vocab_size, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TePoint:
    """One engine at one degree: tokens per second of all replicas, and milliseconds of a step's parts.

    `task_ms` are means over all steps: T3 and T4 on the device, and what the host exposed.
    """

    tp: int
    tokens_per_s: float
    task_ms: Mapping[str, float]
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeSweep:
    """The points of a model by engine, smallest degree first, and why other degrees are not among them."""

    name: str
    rule_of_thumb: int
    points: Mapping[Variant, tuple[TePoint, ...]]
    excluded: Mapping[int, str]

    def best(self, variant: Variant) -> TePoint:
        """The point at t_e: of the most tokens per second, of equal ones that of the smallest degree."""
        return max(self.points[variant], key=lambda point: point.tokens_per_s)


def te_sweep(
    name: str, model: ModelConfig, gpu: Gpu, *, num_gpus: int, terms: StepTerms, batch: OnceLoad
) -> TeSweep:
    """Every engine at every degree that fits; raises ValueError where none does."""
    question = Question(
        name=name,
        model=model,
        gpu=gpu,
        num_gpus=num_gpus,
        targets=ANY_LATENCY,
        arrivals=[Arrival(arrived_s=0.0, input_tokens=batch.input_tokens, output_tokens=batch.output_tokens)]
        * 2,
        rows=(ROWS_PER_GPU * num_gpus,),
        step_tokens=(_STEP_TOKENS,),
    )
    degrees = fit(question, read_workload(question))
    points = {
        variant: tuple(
            _point(_replica(question, degree, terms, variant), batch, degree) for degree in degrees.fitting
        )
        for variant in Variant
    }
    return TeSweep(
        name=name,
        rule_of_thumb=question.rule_of_thumb,
        points=points,
        excluded={each.tp: each.reason for each in degrees.excluded},
    )


def _replica(question: Question, degree: Degree, terms: StepTerms, variant: Variant) -> Replica:
    return Replica(
        config=SchedulerConfig(
            max_rows=ROWS_PER_GPU * degree.tp, max_step_tokens=_STEP_TOKENS, depth=variant.depth
        ),
        limits=degree.limits,
        steps=terms.steps(question.model, question.gpu, tp=degree.tp, mode=variant.sampling),
        shares_prefixes=False,
    )


def why(sweep: TeSweep, variant: Variant, expected: int) -> str:
    """The parts of a step that make the t_e found better than the one expected; "" if they are the same.

    All replicas together have the same rows at any t, so that the shorter step serves more.
    """
    best = sweep.best(variant)
    if best.tp == expected:
        return ""
    others = [point for point in sweep.points[variant] if point.tp == expected]
    if not others:
        return (
            f"t={expected} is not possible: {sweep.excluded.get(expected, 'the model does not divide by it')}"
        )
    (other,) = others
    parts = {name: other.task_ms[name] - best.task_ms[name] for name in best.task_ms}
    told = ", ".join(
        f"{name} {best.task_ms[name]:.2f} to {other.task_ms[name]:.2f} ms ({difference:+.2f})"
        for name, difference in sorted(parts.items(), key=lambda part: -part[1])
    )
    loss = other.tokens_per_s / best.tokens_per_s - 1
    return f"t={expected} serves {loss:+.1%}; from t={best.tp} to it: {told}"


def _point(replica: Replica, batch: OnceLoad, degree: Degree) -> TePoint:
    requests = batch.requests(rows=replica.config.max_rows, vocab_size=replica.limits.vocab_size)
    done = run(replica, requests)
    per_step_ms = 1e3 / max(done.tasks.steps, 1)
    tasks = {task.name: task for task in done.tasks.tasks}
    on_device = {name: task.total_s for name, task in tasks.items() if task.on_device}
    return TePoint(
        tp=degree.tp,
        tokens_per_s=degree.replicas * done.outcome.output_tokens_per_s,
        task_ms={
            **{name: seconds * per_step_ms for name, seconds in on_device.items()},
            "exposed host": done.tasks.exposed_s * per_step_ms,
        },
        preemptions=done.pressure.preemptions,
    )


def forward_factor(
    model: ModelConfig, gpu: Gpu, *, tp: int, rows: int, context: int, seconds: float
) -> float:
    """The seconds of a decode step's forward pass over those of the roofline."""
    free = StepTerms(name="", host=NO_HOST).steps(model, gpu, tp=tp, mode=SamplingMode.REPLICATED)
    return seconds / free.forward(decode_step(rows, context=context))


def decode_step(rows: int, *, context: int) -> StepPlan:
    """A step of rows that each compute one token behind so many that are cached."""
    return plain_plan([context] * rows, [1] * rows)


def _slower(cost: Cost, factor: float) -> Cost:
    def slowed(plan: StepPlan) -> float:
        return factor * cost(plan)

    return slowed


def parser() -> ArgumentParser:
    made = simulated_parser(__doc__)
    add_models(made, MODELS)
    made.add_argument("--input-len", type=int, default=128)
    made.add_argument("--output-len", type=int, default=256)
    made.add_argument("--host-record", type=Path, help="of benchmarks.host_steps; default: the newest")
    return made


def newest_host_record() -> Path:
    """The latest record of the host's work: their names end with the date."""
    return max(RESULTS.glob("host-*.json"), key=lambda path: path.stem[-13:])


def terms_of(options: Namespace, gpu: Gpu) -> list[StepTerms]:
    paper_model = model_named(PAPER_MODEL, options.configs)
    slower = forward_factor(
        paper_model,
        gpu,
        tp=PAPER_TP,
        rows=PAPER_ROWS,
        context=options.input_len + options.output_len // 2,
        seconds=PAPER_FORWARD_S,
    )
    own = read_host_terms(options.host_record or newest_host_record())
    return [
        StepTerms(name="paper", host=VLLM_0_11_2, sampler=VLLM_SAMPLER),
        StepTerms(name="paper, its T3", host=VLLM_0_11_2, sampler=VLLM_SAMPLER, forward_factor=slower),
        StepTerms(name="own", host=own),
    ]


def series_of(terms: StepTerms, sweep: TeSweep) -> list[Series]:
    return [
        series
        for variant, points in sweep.points.items()
        for point in points
        for series in simulated_series(
            f"{sweep.name}, {variant}",
            f"{terms.name} terms, t={point.tp}",
            {
                ("output", "tokens/s"): point.tokens_per_s,
                **{(task, "ms/step"): spent for task, spent in point.task_ms.items()},
                ("preemptions", "count"): point.preemptions,
            },
        )
    ]


def expected_tp(name: str, variant: Variant) -> int | None:
    """The paper's t_e for a model of this size, None if it names none: vLLM's for the synchronous engine."""
    found = paper_tp(name)
    return None if found is None else found[0 if variant is Variant.SYNCHRONOUS else 1]


def told(sweeps: Sequence[TeSweep]) -> list[str]:
    """A table, and why some t_e are not the paper's."""
    lines = [f"{'model':<20}{'4M/C':>5}  {'t_e: ' + ', '.join(Variant):<52}{'paper':>7}  tokens/s by t"]
    reasons: list[str] = []
    for sweep in sweeps:
        found = [sweep.best(variant).tp for variant in Variant]
        paper = [expected_tp(sweep.name, each) for each in (Variant.SYNCHRONOUS, Variant.SHARDED)]
        rates = " | ".join(
            " ".join(f"{point.tokens_per_s:,.0f}" for point in sweep.points[variant]) for variant in Variant
        )
        degrees = ", ".join(map(str, found))
        lines.append(
            f"{sweep.name:<20}{sweep.rule_of_thumb:>5}  {degrees:<52}{paper[0]}→{paper[1]:<5}  {rates}"
        )
        for variant in (Variant.SYNCHRONOUS, Variant.SHARDED):
            expected = expected_tp(sweep.name, variant)
            reason = "" if expected is None else why(sweep, variant, expected)
            if reason:
                reasons.append(f"  {sweep.name}, {variant}: {reason}")
    return [*lines, "where the paper differs:", *reasons]


def plot(terms: StepTerms, sweeps: Sequence[TeSweep], stem: Path) -> list[Path]:
    """The t_e of all models, and the throughput of the 32B model, as SVG files beside the record."""
    short = [sweep.name.removesuffix("-hf").removeprefix("Meta-") for sweep in sweeps]
    names = ["\n".join(name.rsplit("-", 1)) for name in short]
    bars = [
        BarSegment(name=f"{variant}", values=[float(sweep.best(variant).tp) for sweep in sweeps])
        for variant in Variant
    ]
    for title, variant in (("paper: vLLM", Variant.SYNCHRONOUS), ("paper: Albireo", Variant.SHARDED)):
        found = [expected_tp(sweep.name, variant) for sweep in sweeps]
        bars.append(
            BarSegment(name=title, values=[None if tp is None else float(tp) for tp in found], hatched=True)
        )
    label = stem.with_name(f"{stem.name}-{terms.name.replace(', ', '-').replace(' ', '-').lower()}")
    figures = {
        "te": grouped_bars(names, bars, y_label="t_e", title=f"t_e, simulated (roofline), {terms.name} terms")
    }
    for sweep in sweeps:
        if sweep.name == PAPER_MODEL:
            best = sweep.best(Variant.SHARDED)
            figures["throughput"] = line_figure(
                [
                    Line(
                        name=f"{variant}",
                        x=[point.tp for point in points],
                        y=[point.tokens_per_s for point in points],
                    )
                    for variant, points in sweep.points.items()
                ],
                x_label="t",
                y_label="tokens/s of all GPUs",
                title=f"{sweep.name}, simulated (roofline), {terms.name} terms",
                log2_x=True,
                marks=[Mark(x=best.tp, y=best.tokens_per_s, label=f"t_e = {best.tp}")],
            )
    paths = [label.with_name(f"{label.name}-{name}.svg") for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        path.write_text(svg_file(figure))
    return paths


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    gpu = find_gpu(options.gpu)
    load = OnceLoad(input_tokens=options.input_len, output_tokens=options.output_len)
    results: list[tuple[StepTerms, list[TeSweep]]] = []
    findings: dict[str, list[str]] = {}
    for terms in terms_of(options, gpu):
        sweeps = [
            te_sweep(name, model, gpu, num_gpus=options.gpus, terms=terms, batch=load)
            for name in options.models
            for model in (model_named(name, options.configs),)
        ]
        results.append((terms, sweeps))
        findings[terms.name] = told(sweeps)
        print(f"\n{terms.name} terms, simulated (roofline), forward pass x {terms.forward_factor:.2f}")
        print("\n".join(findings[terms.name]), flush=True)
    path = recording.write(
        "simulated-te-sweep",
        [each for terms, sweeps in results for sweep in sweeps for each in series_of(terms, sweep)],
        note=f"{NOT_MEASURED} Prompt and answer lengths stand for the paper's dolly prompts.",
        device=simulated_gpus(options),
        settings={
            "rows_per_gpu": ROWS_PER_GPU,
            "terms": {
                terms.name: {
                    "host": terms.host.source,
                    "sampler": "this project's" if terms.sampler is None else terms.sampler.source,
                    "forward_factor": terms.forward_factor,
                }
                for terms, _ in results
            },
            "findings": findings,
        },
    )
    for terms, sweeps in results:
        for plotted in plot(terms, sweeps, path.with_suffix("")):
            print(plotted)


if __name__ == "__main__":
    main()
