"""KV pressure against t: pages in use, waiting, preemptions and tokens per second, a trace at several rates.

A model near the limit of a GPU's memory has few pages at a small t: more replicas, but each of them short.
Simulated: the shipped scheduler on a clock, with the roofline of a GPU. Writes a record whose name begins
with `simulated-`, and plots beside it.

    python benchmarks/studies/contention_study.py --config Qwen2.5-32B_config.json --trace azure.csv
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.measure.figures import Line, line_figure, svg_file
from albireo_jax.measure.records import Record, Series, write_record
from albireo_jax.measure.throughput import percentile
from albireo_jax.sim.gpus import find_gpu
from albireo_jax.sim.host import OWN_HOST
from albireo_jax.sim.planning.plan_sizes import Excluded, Question
from albireo_jax.sim.replica import Targets
from albireo_jax.sim.step_model import StepModel, roofline_model
from albireo_jax.sim.workload import read_trace
from benchmarks.lib.kv_pressure import PressurePoint, pressure_points
from benchmarks.lib.simulated import NOT_MEASURED, simulated_gpus

ROOT = Path(__file__).resolve().parents[2]
_ANY = Targets(ttft_s=1e9, tpot_s=1e9)
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8, 16, 24, 32, 48], metavar="PER_S")
    parser.add_argument("--requests", type=int, default=400, help="of the trace, per replica")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def points_of(options: argparse.Namespace) -> list[PressurePoint]:
    """All points that fit, told as they come."""
    model, gpu = model_config_from_hf(json.loads(options.config.read_text())), find_gpu(options.gpu)
    question = Question(
        name=options.config.stem.removesuffix("_config"),
        model=model,
        gpu=gpu,
        num_gpus=options.gpus,
        targets=_ANY,
        arrivals=read_trace(options.trace),
        rows=(options.rows,),
        step_tokens=(options.step_tokens,),
        requests_per_replica=options.requests,
    )

    def steps_at(tp: int) -> StepModel:
        return roofline_model(model, gpu, tp=tp, host=OWN_HOST, mode=SamplingMode.SHARDED)

    points: list[PressurePoint] = []
    print(f"{question.name} on {options.gpus} x {gpu.title}: all figures simulated (roofline)")
    heads = f"{'pages mean':>12}{'most':>7}{'waiting':>9}{'preempted':>11}{'tokens/s':>10}"
    print(f"{'t':>2}{'requests/s':>12}{heads}")
    for point in pressure_points(question, steps_at, rates_per_s=options.rates):
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
    options = arguments()
    points, name = points_of(options), options.config.stem.removesuffix("_config").rsplit("--", 1)[-1]
    record = Record(
        name=f"simulated-contention-{name.lower()}",
        device=simulated_gpus(find_gpu(options.gpu), options.gpus),
        settings={
            "model": name,
            "trace": options.trace.name,
            "requests_per_replica": options.requests,
            "rows": options.rows,
            "step_tokens": options.step_tokens,
            "sources": list(roofline_sources(options)),
        },
        series=[
            Series(
                subject=f"t={point.degree.tp}, {point.degree.replicas} replicas",
                case=f"{point.rate_per_s:g} requests/s",
                metric=f"{metric}, simulated (roofline)",
                unit=unit,
                samples=(value(point),),
            )
            for point in points
            for (metric, unit), value in METRICS.items()
        ],
        note=f"{NOT_MEASURED} Pages and requests are those of one replica, tokens per second of all.",
    )
    path = write_record(record, options.output)
    print(path)
    for metric, unit in (("pages in use, mean", "share"), ("preemptions", "count"), ("output", "tokens/s")):
        figure = line_figure(
            lines_of(points, METRICS[metric, unit]),
            x_label="requests/s of all replicas",
            y_label=f"{metric}, {unit}",
            title=f"{name}, simulated (roofline)",
        )
        plot = path.with_name(f"{path.stem}-{metric.split(',')[0].replace(' ', '-')}.svg")
        plot.write_text(svg_file(figure))
        print(plot)


def roofline_sources(options: argparse.Namespace) -> tuple[str, ...]:
    """Where the times come from."""
    model, gpu = model_config_from_hf(json.loads(options.config.read_text())), find_gpu(options.gpu)
    return roofline_model(model, gpu, tp=1, host=OWN_HOST, mode=SamplingMode.SHARDED).sources


if __name__ == "__main__":
    main()
