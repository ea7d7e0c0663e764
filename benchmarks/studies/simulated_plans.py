"""The planner's t for models of several sizes, synchronous and overlapped, beside the paper's and 4 M / C.

Simulated: the shipped scheduler on a clock, with the roofline of a GPU. Nothing was measured on one. Writes a
record whose name begins with `simulated-`, with every plan's table and assumptions in its settings.

    python -m benchmarks.studies.simulated_plans --configs DIR --trace azure.csv
    python -m benchmarks.studies.simulated_plans --configs DIR --trace azure.csv --ttft 500 --tpot 15
"""

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

from albireo_jax.core.config import SamplingMode
from albireo_jax.measure.records import Series
from albireo_jax.sim.gpus import find_gpu
from albireo_jax.sim.host import OWN_HOST, VLLM_0_11_2, HostTerms
from albireo_jax.sim.planning.plan_report import as_json, rows
from albireo_jax.sim.planning.plan_sizes import Question
from albireo_jax.sim.planning.planner import NoPlanError, Plan, make_plan
from albireo_jax.sim.replica import Targets
from albireo_jax.sim.step_model import VLLM_SAMPLER, SamplerTerms, roofline_model
from albireo_jax.sim.workload import read_trace
from benchmarks.lib.recording import Recording
from benchmarks.lib.simulated import (
    NOT_MEASURED,
    add_models,
    model_named,
    paper_tp,
    simulated_gpus,
    simulated_parser,
    simulated_series,
)

MODELS = (
    "Qwen2.5-7B",
    "Meta-Llama-3.1-8B",
    "Qwen2.5-14B",
    "Qwen2.5-32B",
    "Meta-Llama-3.1-70B",
    "Qwen2.5-72B",
)


class PlannedEngine(NamedTuple):
    """A way to run the steps."""

    name: str
    depth: int
    sampling: SamplingMode
    host: HostTerms
    sampler: SamplerTerms | None


ENGINES = (
    PlannedEngine("synchronous, vLLM 0.11.2's terms", 1, SamplingMode.REPLICATED, VLLM_0_11_2, VLLM_SAMPLER),
    PlannedEngine("synchronous, our terms", 1, SamplingMode.REPLICATED, OWN_HOST, None),
    PlannedEngine("overlapped, sharded, our terms", 2, SamplingMode.SHARDED, OWN_HOST, None),
)


def parser() -> ArgumentParser:
    made = simulated_parser(__doc__)
    add_models(made, MODELS)
    made.add_argument("--trace", type=Path, required=True)
    made.add_argument("--ttft", type=float, default=1000.0, help="milliseconds")
    made.add_argument("--tpot", type=float, default=40.0, help="milliseconds")
    made.add_argument("--requests", type=int, default=400, help="of the trace, per replica")
    made.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    made.add_argument("--step-tokens", type=int, nargs="+", default=[512, 2048])
    return made


def plan_of(name: str, engine: PlannedEngine, options: Namespace) -> Plan:
    model, gpu = model_named(name, options.configs), find_gpu(options.gpu)
    question = Question(
        name=name,
        model=model,
        gpu=gpu,
        num_gpus=options.gpus,
        targets=Targets(ttft_s=options.ttft / 1e3, tpot_s=options.tpot / 1e3),
        arrivals=read_trace(options.trace),
        depth=engine.depth,
        sampling=engine.sampling,
        rows=tuple(options.rows),
        step_tokens=tuple(options.step_tokens),
        requests_per_replica=options.requests,
    )
    return make_plan(
        question,
        lambda tp: roofline_model(
            model, gpu, tp=tp, host=engine.host, mode=engine.sampling, sampler=engine.sampler
        ),
    )


def series_of(name: str, engine: PlannedEngine, plan: Plan) -> list[Series]:
    return [
        series
        for row in rows(plan)
        if row.requests_per_s is not None and row.output_tokens_per_s is not None
        for series in simulated_series(
            f"{name}, {engine.name}",
            f"t={row.tp}",
            {("goodput", "requests/s"): row.requests_per_s, ("output", "tokens/s"): row.output_tokens_per_s},
        )
    ]


def told(name: str, engine: PlannedEngine, plan: Plan) -> str:
    """A plan in a line."""
    rates = "  ".join(
        f"t={row.tp}: {'-' if row.requests_per_s is None else format(row.requests_per_s, '.3g')}"
        for row in rows(plan)
    )
    paper = "→".join(map(str, paper_tp(name) or "?"))
    return (
        f"{name:<20}{engine.name:<34}t_e={plan.best.degree.tp}  paper {paper}  "
        f"4M/C {plan.question.rule_of_thumb}  requests/s {rates}"
    )


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    series: list[Series] = []
    plans: dict[str, object] = {}
    targets = f"{options.ttft:g} ms to the first token, {options.tpot:g} ms a token"
    print(f"{options.gpus} x {find_gpu(options.gpu).title}, {targets}: all figures simulated (roofline)")
    for name in options.models:
        for engine in ENGINES:
            began_s = time.perf_counter()
            try:
                plan = plan_of(name, engine, options)
            except NoPlanError as error:
                plans[f"{name}, {engine.name}"] = str(error)
                print(f"{name:<20}{engine.name:<34}{error}", flush=True)
                continue
            series += series_of(name, engine, plan)
            plans[f"{name}, {engine.name}"] = as_json(plan)
            print(f"{told(name, engine, plan)}  ({time.perf_counter() - began_s:.0f} s)", flush=True)
    recording.write(
        "simulated-plans",
        series,
        note=NOT_MEASURED,
        device=simulated_gpus(options),
        settings={"attainment": Targets(ttft_s=1, tpot_s=1).attainment, "plans": plans},
    )


if __name__ == "__main__":
    main()
