"""What too little KV memory costs, with a host tier and without: conversations in a third of their pages.

On the engine (`--models`), all kinds of memory in turn, so that they share the machine's noise; and on the
simulator (`--config`), whose device is the roofline of an H100 and whose bus is what `--bus-gb-per-s` says:
nothing of that was measured on a GPU.

    python benchmarks/swap.py --models smollm2 --config config.json
"""

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from albireo_jax import LLM
from albireo_jax.core.config import Dtype, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.memory import page_bytes
from albireo_jax.core.model_files import find_model
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.models.registry import model_config
from albireo_jax.sim.cost import H100_SXM, roofline_cost
from benchmarks.lib.swap_runs import (
    PAGE_SIZE,
    Memory,
    Pages,
    SimulatedDevice,
    SwapRun,
    Talks,
    run_engine,
    simulate,
    swap_series,
)

ROOT = Path(__file__).resolve().parents[1]
_VOCAB = 400
"""Ids of the prompts are below: every vocabulary has them."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[], help="built-in names or folders, run here")
    parser.add_argument("--config", type=Path, help="a Hugging Face config.json, simulated")
    parser.add_argument("--bus-gb-per-s", type=float, default=25.0)
    parser.add_argument("--talks", type=int, default=24, help="conversations, on the engine")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--said", type=int, default=96, help="tokens that a turn adds, on the engine")
    parser.add_argument("--answered", type=int, default=32, help="tokens of an answer, on the engine")
    parser.add_argument("--simulated-talks", type=int, default=64, help="of 8 times as long turns")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def bench_engine(model: str, options: argparse.Namespace) -> list[Series]:
    """Series of a model on this machine; every kind of memory has an engine, and they take turns."""
    talks = Talks(
        count=options.talks,
        turns=options.turns,
        said=options.said,
        answered=options.answered,
        vocab_size=_VOCAB,
    )
    runs: dict[Memory, list[SwapRun]] = {memory: [] for memory in Memory}
    with ExitStack() as engines:
        llms = {
            memory: engines.enter_context(
                launched(model, Pages.of(memory, demand=talks.demand), options, context=talks.length)
            )
            for memory in Memory
        }
        for repeat in range(options.repeats + 1):
            for memory, llm in llms.items():
                engine = llm.engine
                run = run_engine(
                    engine.frontend,
                    replace(talks, seed=repeat),
                    stats=engine.service.stats,
                    timeline=engine.timeline,
                )
                if repeat:  # the first one warms up
                    runs[memory].append(run)
    return [series for memory in Memory for series in swap_series(Path(model).name, memory, runs[memory])]


def launched(model: str, pages: Pages, options: argparse.Namespace, *, context: int) -> LLM:
    """An engine with so many pages."""
    host_bytes = 0
    if pages.host:
        files = find_model(model)
        dtype = Dtype(options.dtype)
        host_bytes = pages.host * page_bytes(model_config(files), tp=1, page_size=PAGE_SIZE, dtype=dtype)
    return LLM(
        model,
        dtype=options.dtype,
        max_model_len=context,
        max_rows=options.rows,
        max_step_tokens=128,
        page_size=PAGE_SIZE,
        num_pages=pages.device,
        host_kv_memory_bytes=host_bytes,
    )


def bench_simulator(options: argparse.Namespace) -> list[Series]:
    """Series of a configuration on the simulator's clock."""
    model = model_config_from_hf(json.loads(options.config.read_text()))
    device = SimulatedDevice.over_bus(
        model,
        roofline_cost(model, H100_SXM, tp=1, dtype=Dtype.BFLOAT16),
        dtype=Dtype.BFLOAT16,
        bus_bytes_per_s=options.bus_gb_per_s * 1e9,
    )
    talks = Talks(
        count=options.simulated_talks,
        turns=options.turns,
        said=8 * options.said,
        answered=8 * options.answered,
        vocab_size=_VOCAB,
    )
    config = SchedulerConfig(max_rows=32, max_step_tokens=512)
    subject = f"{options.config.stem.removesuffix('_config')} (H100 simulated)"
    return [
        series
        for memory in Memory
        for series in swap_series(
            subject, memory, [simulate(device, talks, Pages.of(memory, demand=talks.demand), config=config)]
        )
    ]


def main() -> None:
    options = arguments()
    load = os.getloadavg()[0]
    series = [each for model in options.models for each in bench_engine(model, options)]
    if options.config is not None:
        series += bench_simulator(options)
    for each in series:
        print(f"{each.subject:<44}{each.case:<11}{each.metric:<28}{each.median:>12.4g} {each.unit}")
    record = Record(
        name="swap",
        device=cpu_device(),
        settings={
            "talks": options.talks,
            "simulated_talks": options.simulated_talks,
            "turns": options.turns,
            "said": options.said,
            "answered": options.answered,
            "rows": options.rows,
            "bus_gb_per_s": options.bus_gb_per_s,
            "dtype": options.dtype,
        },
        series=series,
        note="Subjects that say so were simulated: no GPU was measured.",
        load_before=load,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
