"""The simulator against the engine: throughput and times per token, predicted and measured, for five loads.

At each degree an engine of a random model is calibrated on this machine (`measure/calibrate.py` says
how), with the five loads run between the rounds of its measurement, for the machine drifts. Then the
simulator, whose terms have seen none of these loads, predicts them: two batches, a Poisson process, the
Azure trace, and the Mooncake trace with its shared prefixes. On a CPU, t virtual devices share the
machine's cores.

    python benchmarks/validate_simulator.py MODEL_FOLDER --traces TRACE_FOLDER --tp 1 2 4
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from albireo_jax.core.config import EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.limits import EngineLimits
from albireo_jax.launch import prepare_random, use_virtual_devices
from albireo_jax.measure.calibrate import measure_shard
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.sim.outcome import Outcome
from albireo_jax.sim.workload import read_trace
from benchmarks.lib.simulator_checks import (
    Comparison,
    Load,
    batch_load,
    measure,
    poisson_load,
    predict,
    trace_load,
)

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.15


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder with a config.json; weights are random")
    parser.add_argument("--traces", type=Path, required=True, help="a folder with the two traces")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of the arriving loads")
    parser.add_argument("--requests", type=int, default=40, help="requests of each load")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def loads(options: argparse.Namespace, limits: EngineLimits) -> list[Load]:
    """The five loads."""
    count, rate = options.requests, options.rate
    longest, vocab = limits.max_sequence_len, limits.vocab_size
    azure = read_trace(options.traces / "azure_conv_2023_first300.csv")[:count]
    mooncake = read_trace(options.traces / "mooncake_conversation_first300.csv")[:count]
    return [
        batch_load("batch", count=count, input_len=longest // 10, output_len=longest // 20, vocab_size=vocab),
        batch_load("long prompts", count=count // 4, input_len=longest // 2, output_len=8, vocab_size=vocab),
        poisson_load(
            "poisson", azure, factor=longest / 10_000, rate_per_s=rate, count=count, limits=limits, seed=1
        ),
        trace_load("azure", azure, factor=longest / 10_000, rate_per_s=rate, limits=limits),
        trace_load("mooncake", mooncake, factor=longest / 40_000, rate_per_s=rate, limits=limits),
    ]


def compared(options: argparse.Namespace, tp: int) -> list[Comparison]:
    """All loads at one degree, for each depth."""
    model = model_config_from_hf(json.loads((options.model / "config.json").read_text()))
    base = EngineConfig(
        model=str(options.model),
        max_model_len=options.max_model_len,
        max_logprobs=0,
        parallel=ParallelConfig(tp=tp),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    ready = prepare_random(base, model, measure_sampling=True)
    everything = loads(options, ready.limits)
    configs = [
        SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens, depth=depth)
        for depth in options.depths
    ]
    measured: dict[tuple[str, int], list[Outcome]] = {}

    def run_all() -> None:
        for load in everything:
            for config in configs:
                seen = measure(ready.executor, load, config=config, limits=ready.limits)
                measured.setdefault((load.name, config.depth), []).append(seen)

    shard = measure_shard(
        ready, depths=options.depths, repeats=options.repeats + 1, source="measured", between=run_all
    )
    return [
        Comparison(
            load=load.name,
            tp=tp,
            depth=config.depth,
            predicted=predict(shard, load, config=config, limits=ready.limits),
            measured=tuple(measured[load.name, config.depth]),
        )
        for load in everything
        for config in configs
    ]


def series_of(comparison: Comparison) -> list[Series]:
    """The figures of one load at one degree and depth."""
    case = f"{comparison.load}, t = {comparison.tp}, depth {comparison.depth}"
    found: list[Series] = []
    for subject, runs in (("predicted", (comparison.predicted,)), ("measured", comparison.measured)):
        for metric, unit, values in (
            ("output tokens", "1/s", [run.output_tokens_per_s for run in runs]),
            ("time per output token, p50", "s", [run.tpot_p50_s for run in runs]),
            ("time to first token, p50", "s", [run.ttft_p50_s for run in runs]),
        ):
            found.append(Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(values)))
    return found


def render(comparisons: Sequence[Comparison]) -> str:
    """The error table as text."""
    head = f"{'load':<14}{'t':>3}{'depth':>6}{'tokens/s':>11}{'error':>8}{'TPOT ms':>9}{'error':>8}"
    lines = [f"{head}{'TTFT ms':>9}{'error':>8}"]
    lines += [
        f"{each.load:<14}{each.tp:>3}{each.depth:>6}"
        f"{each.measured_tokens_per_s:>11.1f}{each.throughput_error:>+8.1%}"
        f"{1e3 * each.measured_tpot_s:>9.2f}{each.tpot_error:>+8.1%}"
        f"{1e3 * each.measured_ttft_s:>9.1f}{each.ttft_error:>+8.1%}"
        for each in comparisons
    ]
    outside = [each for each in comparisons if max(abs(each.throughput_error), abs(each.tpot_error)) > LIMIT]
    lines.append(f"{len(comparisons) - len(outside)} of {len(comparisons)} within {LIMIT:.0%}")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    use_virtual_devices(max(options.tp))
    comparisons = [each for tp in options.tp for each in compared(options, tp)]
    print(render(comparisons))
    record = Record(
        name="validate-simulator",
        device=cpu_device(virtual_devices=max(options.tp)),
        settings={
            "model": options.model.name,
            **{name: value for name, value in vars(options).items() if isinstance(value, int | float | list)},
        },
        series=[series for each in comparisons for series in series_of(each)],
        note=render(comparisons),
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
