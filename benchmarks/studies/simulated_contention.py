"""KV pressure against t: pages in use, waiting, preemptions and tokens per second, a trace at several rates.

A model near the limit of a GPU's memory has few pages at a small t: more replicas, but each of them short.
Simulated: the shipped scheduler on a clock, with the roofline of a GPU. Writes a record whose name begins
with `simulated-`, and plots beside it.

    python -m benchmarks.studies.simulated_contention --config Qwen2.5-32B_config.json --trace azure.csv
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from albireo_jax.core.config import SamplingMode, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.measure.figures import Line, line_figure, svg_file
from albireo_jax.measure.throughput import percentile
from albireo_jax.sim.gpus import find_gpu
from albireo_jax.sim.host import OWN_HOST
from albireo_jax.sim.planning.plan_sizes import (
    Degree,
    Excluded,
    Question,
    fit,
    read_workload,
    replica_requests,
)
from albireo_jax.sim.planning.planner import StepModels
from albireo_jax.sim.replica import Replica, SimulatedRun, run, scaled_arrivals
from albireo_jax.sim.step_model import StepModel, roofline_model
from albireo_jax.sim.workload import read_trace
from benchmarks.lib.recording import Recording
from benchmarks.lib.simulated import (
    ANY_LATENCY,
    NOT_MEASURED,
    simulated_gpus,
    simulated_parser,
    simulated_series,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PressurePoint:
    """A replica of a degree at a rate of requests over all replicas."""

    degree: Degree
    rate_per_s: float
    run: SimulatedRun

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of all replicas."""
        return self.degree.replicas * self.run.outcome.output_tokens_per_s

    @property
    def mean_pages_share(self) -> float:
        """Share of the pages in use, mean over the steps."""
        return self.run.pressure.mean_pages / self.run.pressure.num_pages

    @property
    def peak_pages_share(self) -> float:
        """Share of the pages in use at most."""
        return self.run.pressure.peak_pages / self.run.pressure.num_pages


def pressure_points(
    question: Question, steps_at: StepModels, *, rates_per_s: Sequence[float]
) -> Iterator[PressurePoint | Excluded]:
    """Each degree at each rate, degree by degree; those that do not fit come first, with the reason.

    All have the most rows and step tokens that the question names. Its targets play no part.
    """
    workload = read_workload(question)
    degrees = fit(question, workload)
    yield from degrees.excluded
    config = SchedulerConfig(
        max_rows=max(question.rows), max_step_tokens=max(question.step_tokens), depth=question.depth
    )
    for degree in degrees.fitting:
        requests = replica_requests(question, workload)
        replica = Replica(
            config=config,
            limits=degree.limits,
            steps=steps_at(degree.tp),
            shares_prefixes=workload.shares_prefixes,
        )
        for rate_per_s in rates_per_s:
            arriving = scaled_arrivals(requests, rate_per_s=rate_per_s / degree.replicas)
            yield PressurePoint(degree=degree, rate_per_s=rate_per_s, run=run(replica, arriving))


Metric = Callable[[PressurePoint], float]
METRICS: dict[tuple[str, str], Metric] = {
    ("pages in use, mean", "share"): lambda point: point.mean_pages_share,
    ("pages in use, most", "share"): lambda point: point.peak_pages_share,
    ("waiting requests, mean", "count"): lambda point: point.run.pressure.mean_waiting,
    ("waiting requests, most", "count"): lambda point: float(point.run.pressure.peak_waiting),
    ("running requests, most", "count"): lambda point: float(point.run.pressure.peak_running),
    ("preemptions", "count"): lambda point: float(point.run.pressure.preemptions),
    ("output", "tokens/s"): lambda point: point.tokens_per_s,
    ("time to first token, p50", "s"): lambda point: percentile(point.run.outcome.ttft_s, 0.5),
    ("time to first token, p99", "s"): lambda point: percentile(point.run.outcome.ttft_s, 0.99),
    ("time per output token, p50", "s"): lambda point: percentile(point.run.outcome.tpot_s, 0.5),
}


def parser() -> ArgumentParser:
    made = simulated_parser(__doc__)
    made.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    made.add_argument("--trace", type=Path, required=True)
    made.add_argument("--rates", type=float, nargs="+", default=[4, 8, 16, 24, 32, 48], metavar="PER_S")
    made.add_argument("--requests", type=int, default=400, help="of the trace, per replica")
    made.add_argument("--rows", type=int, default=256)
    made.add_argument("--step-tokens", type=int, default=2048)
    return made


def question_of(options: Namespace) -> Question:
    """The GPUs, model and trace of the options."""
    return Question(
        name=options.config.stem.removesuffix("_config").rsplit("--", 1)[-1],
        model=model_config_from_hf(json.loads(options.config.read_text())),
        gpu=find_gpu(options.gpu),
        num_gpus=options.gpus,
        targets=ANY_LATENCY,
        arrivals=read_trace(options.trace),
        rows=(options.rows,),
        step_tokens=(options.step_tokens,),
        requests_per_replica=options.requests,
    )


def points_of(question: Question, steps_at: StepModels, rates: Sequence[float]) -> list[PressurePoint]:
    """All points that fit, told as they come."""
    points: list[PressurePoint] = []
    print(f"{question.name} on {question.num_gpus} x {question.gpu.title}: all figures simulated (roofline)")
    heads = f"{'pages mean':>12}{'most':>7}{'waiting':>9}{'preempted':>11}{'tokens/s':>10}"
    print(f"{'t':>2}{'requests/s':>12}{heads}")
    for point in pressure_points(question, steps_at, rates_per_s=rates):
        if isinstance(point, Excluded):
            print(f"{point.tp:>2}  {point.reason}")
            continue
        pressure = point.run.pressure
        print(
            f"{point.degree.tp:>2}{point.rate_per_s:>12g}{point.mean_pages_share:>12.0%}"
            f"{point.peak_pages_share:>7.0%}{pressure.mean_waiting:>9.1f}{pressure.preemptions:>11}"
            f"{point.tokens_per_s:>10,.0f}",
            flush=True,
        )
        points.append(point)
    return points


def lines_of(points: Sequence[PressurePoint], metric: Metric) -> list[Line]:
    """A line for each degree, over the rate."""
    degrees = dict.fromkeys(point.degree.tp for point in points)
    return [
        Line(
            name=f"t={tp}",
            x=[point.rate_per_s for point in points if point.degree.tp == tp],
            y=[metric(point) for point in points if point.degree.tp == tp],
        )
        for tp in degrees
    ]


def main() -> None:
    recording = Recording.begin(parser())
    question = question_of(recording.options)

    def steps_at(tp: int) -> StepModel:
        return roofline_model(question.model, question.gpu, tp=tp, host=OWN_HOST, mode=SamplingMode.SHARDED)

    points = points_of(question, steps_at, recording.options.rates)
    path = recording.write(
        f"simulated-contention-{question.name.lower()}",
        [
            series
            for point in points
            for series in simulated_series(
                f"t={point.degree.tp}, {point.degree.replicas} replicas",
                f"{point.rate_per_s:g} requests/s",
                {metric: value(point) for metric, value in METRICS.items()},
            )
        ],
        note=f"{NOT_MEASURED} Pages and requests are those of one replica, tokens per second of all.",
        device=simulated_gpus(recording.options),
        settings={"model": question.name, "sources": list(steps_at(1).sources)},
    )
    for metric, unit in (("pages in use, mean", "share"), ("preemptions", "count"), ("output", "tokens/s")):
        figure = line_figure(
            lines_of(points, METRICS[metric, unit]),
            x_label="requests/s of all replicas",
            y_label=f"{metric}, {unit}",
            title=f"{question.name}, simulated (roofline)",
        )
        plot = path.with_name(f"{path.stem}-{metric.split(',')[0].replace(' ', '-')}.svg")
        plot.write_text(svg_file(figure))
        print(plot)


if __name__ == "__main__":
    main()
