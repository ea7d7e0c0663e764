"""The work of `albireo calibrate`: the step times of a model at several degrees, for planner and simulator.

On GPUs, one device at a time runs the *shard-shaped* model of each degree t: the heads, feed-forward width
and vocabulary that one of t ranks has, with random weights. So one GPU measures what a rank of t GPUs
computes, without the collectives, which the planner adds by a model. On a CPU, t virtual devices run the
whole model together, collectives and all; they share the machine's cores, so nothing gets faster with t.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.hf_config import model_config_from_hf, read_hf_config
from albireo_jax.core.shards import shard_shaped
from albireo_jax.launch import Prepared, prepare_random, use_virtual_devices
from albireo_jax.measure.records import cpu_device, versions
from albireo_jax.measure.step_terms import measure_shard
from albireo_jax.sim.planning.calibration import Calibration, LoopTerms, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """Degrees to measure, and the sizes of their engines.

    `model` is a config.json, or a folder with one. With `shard_shaped` one device runs the model that one of
    t ranks has; otherwise t virtual devices run it together. All loads run `repeats` times at each of the
    `depths`.
    """

    model: Path
    degrees: tuple[int, ...]
    shard_shaped: bool
    dtype: Dtype | None
    max_rows: int
    max_step_tokens: int
    max_model_len: int
    page_size: int
    depths: tuple[int, ...]
    repeats: int

    def __post_init__(self) -> None:
        """Refuse settings that measure nothing."""
        for name, values in (("tp", self.degrees), ("depths", self.depths), ("repeats", (self.repeats,))):
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {list(values)}")


def calibrate(settings: CalibrationSettings) -> Calibration:
    """Measure each degree in turn; it takes minutes. Raises ValueError for a degree that the model lacks."""
    path = settings.model
    model = read_hf_config(path) if path.is_dir() else model_config_from_hf(json.loads(path.read_text()))
    for tp in settings.degrees:
        model.check_tp(tp)
    if not settings.shard_shaped:
        use_virtual_devices(max(settings.degrees))

    def prepared(tp: int) -> Prepared:
        config = EngineConfig(
            model=str(settings.model),
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_logprobs=0,
            parallel=ParallelConfig(tp=1 if settings.shard_shaped else tp),
            cache=CacheConfig(page_size=settings.page_size),
            scheduler=SchedulerConfig(max_rows=settings.max_rows, max_step_tokens=settings.max_step_tokens),
        )
        shape = shard_shaped(model, tp) if settings.shard_shaped else model
        return prepare_random(config, shape, measure_sampling=True)

    return Calibration(
        model=settings.model.stem.removesuffix("_config"),
        dtype=str(settings.dtype or "the default of the device"),
        device=_device_name(settings),
        source=f"albireo calibrate, jax {versions(['jax'])['jax']}",
        shards=tuple(_shard(settings, tp, prepared(tp)) for tp in settings.degrees),
    )


def render_calibration(calibration: Calibration) -> str:
    """The measured times as text: a table for each degree and depth."""
    return "\n".join(
        line
        for shard in calibration.shards
        for loop in shard.loops
        for line in (f"t = {shard.tp}, depth {loop.depth}", *_loop_lines(loop))
    )


def _shard(settings: CalibrationSettings, tp: int, ready: Prepared) -> Shard:
    way = "one device with the model of one rank" if settings.shard_shaped else f"{tp} devices"
    source = f"measured, {way}, t = {tp}"
    shard = measure_shard(ready, depths=settings.depths, repeats=settings.repeats, source=source)
    return replace(shard, tp=tp, is_shard_shaped=settings.shard_shaped)


def _device_name(settings: CalibrationSettings) -> str:
    """The measured device in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpu = cpu_device()
    virtual = "" if settings.shard_shaped else f", as up to {max(settings.degrees)} virtual devices"
    return f"{cpu.count} cores of {cpu.name} ({cpu.detail}){virtual}"


def _loop_lines(loop: LoopTerms) -> Iterator[str]:
    for bucket in loop.steps.buckets:
        yield (
            f"  {bucket.tokens:>6} tokens {bucket.rows:>5} rows {1e3 * bucket.step_s:>10.3f} ms"
            f"   {bucket.samples or 'no'} samples"
        )
    row_ns, chunk_ns = 1e9 * loop.steps.row_pair_s, 1e9 * loop.steps.chunk_pair_s
    yield f"  ns per pair of a query and a cached token: {row_ns:.2f} (decode), {chunk_ns:.2f}"
    host = loop.host
    for name, terms in (("schedule", host.schedule), ("prepare", host.prepare), ("process", host.process)):
        yield (
            f"  {name:<9}{1e6 * terms.step_s:>8.1f} µs + {1e6 * terms.row_s:.2f} a row"
            f" + {1e6 * terms.token_s:.3f} a token"
        )
