"""The planner's t for models of several sizes, synchronous and overlapped, beside the paper's and 4 M / C.

Simulated: the shipped scheduler on a clock, with the roofline of a GPU. Nothing was measured on one. Writes a
record whose name begins with `simulated-`, with every plan's table and assumptions in its settings.

    python benchmarks/studies/plan_table.py --configs DIR --trace azure.csv
    python benchmarks/studies/plan_table.py --configs DIR --trace azure.csv --ttft 500 --tpot 15
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.measure.records import Record, Series, write_record
from albireo_jax.sim.gpus import find_gpu
from albireo_jax.sim.host import OWN_HOST, VLLM_0_11_2, HostTerms
from albireo_jax.sim.planning.plan_report import as_json, rows
from albireo_jax.sim.planning.plan_sizes import Question
from albireo_jax.sim.planning.planner import Answer, NoPlanError, make_plan
from albireo_jax.sim.replica import Targets
from albireo_jax.sim.step_model import VLLM_SAMPLER, SamplerTerms, roofline_model
from albireo_jax.sim.workload import read_trace
from benchmarks.lib.simulated import simulated_gpus

ROOT = Path(__file__).resolve().parents[2]
MODELS = (
    "Qwen2.5-7B",
    "Meta-Llama-3.1-8B",
    "Qwen2.5-14B",
    "Qwen2.5-32B",
    "Meta-Llama-3.1-70B",
    "Qwen2.5-72B",
)
PAPER = {"7B": "1→1", "8B": "1→1", "13B": "1→2", "14B": "1→2", "32B": "2→4", "70B": "4→8", "72B": "4→8"}
"""The t_e that the paper found by throughput, of vLLM and of Albireo, by the size in a model's name."""


class Engine(NamedTuple):
    """A way to run the steps."""

    name: str
    depth: int
    sampling: SamplingMode
    host: HostTerms
    sampler: SamplerTerms | None


ENGINES = (
    Engine("synchronous, vLLM 0.11.2's terms", 1, SamplingMode.REPLICATED, VLLM_0_11_2, VLLM_SAMPLER),
    Engine("synchronous, our terms", 1, SamplingMode.REPLICATED, OWN_HOST, None),
    Engine("overlapped, sharded, our terms", 2, SamplingMode.SHARDED, OWN_HOST, None),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs", type=Path, required=True, help="folder of ORGANISATION--MODEL_config.json"
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--ttft", type=float, default=1000.0, help="milliseconds")
    parser.add_argument("--tpot", type=float, default=40.0, help="milliseconds")
    parser.add_argument("--requests", type=int, default=400, help="of the trace, per replica")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def plan_of(name: str, engine: Engine, options: argparse.Namespace) -> Answer:
    found = sorted(options.configs.glob(f"*--{name}_config.json"))
    if len(found) != 1:
        raise ValueError(f"{options.configs} has {len(found)} files *--{name}_config.json, one is needed")
    (path,) = found
    model, gpu = model_config_from_hf(json.loads(path.read_text())), find_gpu(options.gpu)
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


def series_of(name: str, engine: Engine, answer: Answer) -> list[Series]:
    return [
        Series(
            subject=f"{name}, {engine.name}",
            case=f"t={row.tp}",
            metric=metric,
            unit=unit,
            samples=(value,),
        )
        for row in rows(answer)
        for metric, unit, value in (
            ("goodput, simulated (roofline)", "requests/s", row.requests_per_s),
            ("output, simulated (roofline)", "tokens/s", row.output_tokens_per_s),
        )
        if value is not None
    ]


def main() -> None:
    options = arguments()
    gpu = find_gpu(options.gpu)
    series: list[Series] = []
    plans: dict[str, object] = {}
    targets = f"{options.ttft:g} ms to the first token, {options.tpot:g} ms a token"
    print(f"{options.gpus} x {gpu.title}, {targets}: all figures simulated (roofline)")
    for name in options.models:
        for engine in ENGINES:
            began_s = time.perf_counter()
            try:
                answer = plan_of(name, engine, options)
            except NoPlanError as error:
                plans[f"{name}, {engine.name}"] = str(error)
                print(f"{name:<20}{engine.name:<34}{error}", flush=True)
                continue
            series += series_of(name, engine, answer)
            plans[f"{name}, {engine.name}"] = as_json(answer)
            rates = "  ".join(
                f"t={row.tp}: {'-' if row.requests_per_s is None else format(row.requests_per_s, '.3g')}"
                for row in rows(answer)
            )
            paper = PAPER.get(name.rsplit("-", 1)[-1], "?")
            print(
                f"{name:<20}{engine.name:<34}t_e={answer.best.degree.tp}  paper {paper}  "
                f"4M/C {answer.question.rule_of_thumb}  requests/s {rates}  "
                f"({time.perf_counter() - began_s:.0f} s)",
                flush=True,
            )
    record = Record(
        name="simulated-plans",
        device=simulated_gpus(gpu, options.gpus),
        settings={
            "ttft_ms": options.ttft,
            "tpot_ms": options.tpot,
            "attainment": 0.9,
            "requests_per_replica": options.requests,
            "rows": list(options.rows),
            "step_tokens": list(options.step_tokens),
            "trace": options.trace.name,
            "plans": plans,
        },
        series=series,
        note="Simulated (roofline): the shipped scheduler on a clock. Nothing was measured on a GPU.",
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
