"""Which t_e for models of 7B to 72B on 8 x 80 GB: synchronous, overlapped, and with sharded sampling.

The paper's Figure 14, simulated: 32 requests per GPU, all at once, at t = 1, 2, 4, 8. Thrice, with different
terms of a step, each stated in the record:

    paper           the host and sampling of vLLM 0.11.2 as the paper measured them; the roofline's forward
    paper, its T3   the same; the forward pass slowed until Qwen2.5-32B takes the paper's 21 ms at t=4
    own             this engine's host times, newest record, and its sampler

Prints for each model the t_e beside the paper's and 4 M / C, and what part of a step makes the difference.
Nothing is measured on a GPU. Writes a record whose name begins with `simulated-`, and plots beside it.

    python benchmarks/studies/te_sweep_study.py --configs DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from albireo_jax.core.config import ModelConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.measure.figures import Line, Mark, Part, grouped_bars, line_figure, svg_file
from albireo_jax.measure.records import Record, Series, write_record
from albireo_jax.sim.gpus import Gpu, find_gpu
from albireo_jax.sim.host import VLLM_0_11_2, read_host_terms
from albireo_jax.sim.step_model import VLLM_SAMPLER
from benchmarks.lib.simulated import NOT_MEASURED, simulated_gpus
from benchmarks.lib.te_terms import (
    Ablation,
    Batch,
    Terms,
    TeSweep,
    expected_tp,
    forward_factor,
    te_sweep,
    why,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configs", type=Path, required=True, help="folder of ORGANISATION--MODEL_config.json"
    )
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--host-record", type=Path, help="of benchmarks/host_steps.py; default: the newest")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def model_of(name: str, configs: Path) -> ModelConfig:
    """The shape of a model by the end of its file's name."""
    (path,) = configs.glob(f"*--{name}_config.json")
    return model_config_from_hf(json.loads(path.read_text()))


def newest_host_record() -> Path:
    """The latest record of the host's work: their names end with the date."""
    return max(RESULTS.glob("host-*.json"), key=lambda path: path.stem[-13:])


def terms_of(options: argparse.Namespace, gpu: Gpu) -> list[Terms]:
    paper_model = model_of(PAPER_MODEL, options.configs)
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
        Terms(name="paper", host=VLLM_0_11_2, sampler=VLLM_SAMPLER),
        Terms(name="paper, its T3", host=VLLM_0_11_2, sampler=VLLM_SAMPLER, forward_factor=slower),
        Terms(name="own", host=own),
    ]


def series_of(terms: Terms, sweep: TeSweep) -> list[Series]:
    found: list[Series] = []
    for ablation, points in sweep.points.items():
        for point in points:
            values = {"output, simulated (roofline)": ("tokens/s", point.tokens_per_s)}
            values |= {
                f"{task}, simulated (roofline)": ("ms/step", spent) for task, spent in point.task_ms.items()
            }
            values["preemptions, simulated (roofline)"] = ("count", float(point.preemptions))
            found += [
                Series(
                    subject=f"{sweep.name}, {ablation}",
                    case=f"{terms.name} terms, t={point.tp}",
                    metric=metric,
                    unit=unit,
                    samples=(value,),
                )
                for metric, (unit, value) in values.items()
            ]
    return found


def told(sweeps: Sequence[TeSweep]) -> list[str]:
    """A table, and why some t_e are not the paper's."""
    lines = [f"{'model':<20}{'4M/C':>5}  {'t_e: ' + ', '.join(Ablation):<52}{'paper':>7}  tokens/s by t"]
    reasons: list[str] = []
    for sweep in sweeps:
        found = [sweep.best(ablation).tp for ablation in Ablation]
        paper = [expected_tp(sweep.name, each) for each in (Ablation.SYNCHRONOUS, Ablation.SHARDED)]
        rates = " | ".join(
            " ".join(f"{point.tokens_per_s:,.0f}" for point in sweep.points[ablation])
            for ablation in Ablation
        )
        degrees = ", ".join(map(str, found))
        lines.append(
            f"{sweep.name:<20}{sweep.rule_of_thumb:>5}  {degrees:<52}{paper[0]}→{paper[1]:<5}  {rates}"
        )
        for ablation in (Ablation.SYNCHRONOUS, Ablation.SHARDED):
            expected = expected_tp(sweep.name, ablation)
            reason = "" if expected is None else why(sweep, ablation, expected)
            if reason:
                reasons.append(f"  {sweep.name}, {ablation}: {reason}")
    return [*lines, "where the paper differs:", *reasons]


def plot(terms: Terms, sweeps: Sequence[TeSweep], stem: Path) -> list[Path]:
    """The t_e of all models, and the throughput of the 32B model, as SVG files beside the record."""
    short = [sweep.name.removesuffix("-hf").removeprefix("Meta-") for sweep in sweeps]
    names = ["\n".join(name.rsplit("-", 1)) for name in short]
    bars = [
        Part(name=f"{ablation}", values=[float(sweep.best(ablation).tp) for sweep in sweeps])
        for ablation in Ablation
    ]
    for title, ablation in (("paper: vLLM", Ablation.SYNCHRONOUS), ("paper: Albireo", Ablation.SHARDED)):
        found = [expected_tp(sweep.name, ablation) for sweep in sweeps]
        bars.append(
            Part(name=title, values=[None if tp is None else float(tp) for tp in found], hatched=True)
        )
    label = stem.with_name(f"{stem.name}-{terms.name.replace(', ', '-').replace(' ', '-').lower()}")
    figures = {
        "te": grouped_bars(names, bars, y_label="t_e", title=f"t_e, simulated (roofline), {terms.name} terms")
    }
    for sweep in sweeps:
        if sweep.name == PAPER_MODEL:
            best = sweep.best(Ablation.SHARDED)
            figures["throughput"] = line_figure(
                [
                    Line(
                        name=f"{ablation}",
                        x=[point.tp for point in points],
                        y=[point.tokens_per_s for point in points],
                    )
                    for ablation, points in sweep.points.items()
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
    options = arguments()
    gpu = find_gpu(options.gpu)
    batch = Batch(input_tokens=options.input_len, output_tokens=options.output_len)
    results: list[tuple[Terms, list[TeSweep]]] = []
    findings: dict[str, list[str]] = {}
    for terms in terms_of(options, gpu):
        sweeps = [
            te_sweep(
                name,
                model_of(name, options.configs),
                gpu,
                num_gpus=options.gpus,
                terms=terms,
                batch=batch,
            )
            for name in options.models
        ]
        results.append((terms, sweeps))
        findings[terms.name] = told(sweeps)
        print(f"\n{terms.name} terms, simulated (roofline), forward pass x {terms.forward_factor:.2f}")
        print("\n".join(findings[terms.name]), flush=True)
    record = Record(
        name="simulated-te-sweep",
        device=simulated_gpus(gpu, options.gpus),
        settings={
            "rows_per_gpu": 32,
            "input_len": options.input_len,
            "output_len": options.output_len,
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
        series=[each for terms, sweeps in results for sweep in sweeps for each in series_of(terms, sweep)],
        note=f"{NOT_MEASURED} Prompt and answer lengths stand for the paper's dolly prompts.",
    )
    path = write_record(record, options.output)
    print(path)
    for terms, sweeps in results:
        for plotted in plot(terms, sweeps, path.with_suffix("")):
            print(plotted)


if __name__ == "__main__":
    main()
