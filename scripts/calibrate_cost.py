"""Measures what the steps of a model take on this machine, for the planner and the simulator.

On GPUs, one device at a time runs the *shard-shaped* model of each degree t (`--shard-shaped`): the heads,
feed-forward width and vocabulary that one of t ranks has, with random weights. So one GPU measures what a
rank of t GPUs computes, without the collectives, which the planner adds by a model. On a CPU, t virtual
devices run the whole model together, collectives and all; they share the machine's cores, so nothing gets
faster with t.

    python scripts/calibrate_cost.py config.json --shard-shaped --tp 1 2 4 8 --output llama8b-h100.json
    python scripts/calibrate_cost.py MODEL_FOLDER --tp 1 2 4 --output model-cpu.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.shards import shard_shaped
from albireo_jax.launch import Prepared, prepare_random, use_virtual_devices
from albireo_jax.measure.calibrate import measure_shard
from albireo_jax.measure.records import cpu_device, versions
from albireo_jax.sim.planning.calibration import Calibration, Shard, write_calibration


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a config.json, or a folder with one; weights are random")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shard-shaped", action="store_true", help="one device runs what one of t ranks has")
    parser.add_argument("--dtype", type=Dtype, default=None, choices=list(Dtype))
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="the calibration, a JSON file")
    return parser.parse_args()


def prepared(options: argparse.Namespace, tp: int) -> Prepared:
    """An engine of one degree, or the shard of one of its ranks."""
    path = options.model / "config.json" if options.model.is_dir() else options.model
    model = model_config_from_hf(json.loads(path.read_text()))
    model.check_tp(tp)
    config = EngineConfig(
        model=str(options.model),
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_logprobs=0,
        parallel=ParallelConfig(tp=1 if options.shard_shaped else tp),
        cache=CacheConfig(page_size=options.page_size),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    shape = shard_shaped(model, tp) if options.shard_shaped else model
    return prepare_random(config, shape, measure_sampling=True)


def measured(options: argparse.Namespace, tp: int) -> Shard:
    """What the steps take at one degree."""
    ready = prepared(options, tp)
    way = "one device with the model of one rank" if options.shard_shaped else f"{tp} devices"
    source = f"measured, {way}, t = {tp}"
    shard = measure_shard(ready, depths=options.depths, repeats=options.repeats, source=source)
    return replace(shard, tp=tp, is_shard_shaped=options.shard_shaped)


def device_name(options: argparse.Namespace) -> str:
    """What was measured on, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpu = cpu_device()
    virtual = "" if options.shard_shaped else f", as up to {max(options.tp)} virtual devices"
    return f"{cpu.count} cores of {cpu.name} ({cpu.detail}){virtual}"


def main() -> None:
    options = arguments()
    if not options.shard_shaped:
        use_virtual_devices(max(options.tp))
    shards = [measured(options, tp) for tp in options.tp]
    calibration = Calibration(
        model=options.model.stem.removesuffix("_config"),
        dtype=str(options.dtype or "the default of the device"),
        device=device_name(options),
        source=f"scripts/calibrate_cost.py, jax {versions(['jax'])['jax']}",
        shards=tuple(shards),
    )
    write_calibration(calibration, options.output)
    for shard in shards:
        for loop in shard.loops:
            print(f"t = {shard.tp}, depth {loop.depth}")
            for bucket in loop.steps.buckets:
                print(
                    f"  {bucket.tokens:>6} tokens {bucket.rows:>5} rows {1e3 * bucket.step_s:>10.3f} ms"
                    f"   {bucket.samples or 'no'} samples"
                )
            pairs = 1e9 * loop.steps.row_pair_s, 1e9 * loop.steps.chunk_pair_s
            print(f"  ns per pair of a query and a cached token: {pairs[0]:.2f} (decode), {pairs[1]:.2f}")
            for name in ("schedule", "prepare", "process"):
                terms = getattr(loop.host, name)
                print(
                    f"  {name:<9}{1e6 * terms.step_s:>8.1f} µs + {1e6 * terms.row_s:.2f} a row"
                    f" + {1e6 * terms.token_s:.3f} a token"
                )
    print(options.output)


if __name__ == "__main__":
    main()
