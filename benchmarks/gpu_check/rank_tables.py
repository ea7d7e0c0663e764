"""Tables for the planner: one device runs what a rank of t devices has, at two depths that are carried on.

A rank's share of a large model may not fit on a device, and every layer compiles for itself. So two shallow
models are measured whose other sizes are the rank's. All layers cost the same: seconds of a step are a line
through both depths, and seconds of a pair of a query and a cached token are as many times as many as layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.shards import shard_shaped
from albireo_jax.launch import prepare_random
from albireo_jax.measure.records import versions
from albireo_jax.measure.step_terms import measure_shard
from albireo_jax.runtime.batch import Bucket
from albireo_jax.sim.planning.calibration import Calibration, LoopTerms, Shard, StepTable, write_calibration
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.check_engines import free
from benchmarks.gpu_check.machine import device_here

_RANKS = tuple((model, tp) for model in ("qwen2.5-32b", "llama-3.1-70b") for tp in (2, 4, 8))
_SMALL_RANKS = _RANKS[:1]
_DEPTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Sizes and depths of the shallow engines."""

    layers: tuple[int, int]
    rows: int
    step_tokens: int
    max_model_len: int
    num_pages: int | None
    decode_rows: tuple[int, ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Sizes of steps; the table has these and no others."""
        mixed = (2 * self.rows, self.step_tokens // 4, self.step_tokens)
        return (
            *(Bucket(rows, rows) for rows in self.decode_rows),
            *(Bucket(tokens, self.rows) for tokens in sorted(set(mixed))),
        )


_PLANS: Mapping[bool, _Plan] = {
    True: _Plan(layers=(1, 2), rows=4, step_tokens=32, max_model_len=64, num_pages=32, decode_rows=(2, 4)),
    False: _Plan(
        layers=(2, 4),
        rows=64,
        step_tokens=2048,
        max_model_len=4096,
        num_pages=None,
        decode_rows=(2, 4, 16, 64),
    ),
}


def carried_on(shallow: Shard, deep: Shard, *, layers: Sequence[int]) -> Shard:
    """A shard with the last of three numbers of layers, from those measured with the first two.

    What the host and sampling take does not depend on the depth and is the deeper one's.
    """
    first, second, wanted = layers
    loops = tuple(
        replace(two, steps=_carried_steps(one.steps, two.steps, layers=(first, second, wanted)))
        for one, two in zip(shallow.loops, deep.loops, strict=True)
    )
    return replace(deep, loops=loops)


def run_shards(check: Check) -> None:
    """All degrees of both models; the file of a model has those that there was time for."""
    shards: dict[str, list[Shard]] = {}
    for model, tp in _SMALL_RANKS if check.small else _RANKS:
        if check.figures.has_time(f"{model}, a rank of {tp}"):
            shard = _measured(check, model, tp)
            shards.setdefault(model, []).append(shard)
            _note(check, model, shard)
            _write(check, model, shards[model])


def _measured(check: Check, model: str, tp: int) -> Shard:
    plan, shape = _PLANS[check.small], check.shape(model)
    shallow, deep = (_shallow(plan, shape, tp=tp, layers=layers) for layers in plan.layers)
    return carried_on(shallow, deep, layers=(*plan.layers, shape.num_layers))


def _shallow(plan: _Plan, shape: ModelConfig, *, tp: int, layers: int) -> Shard:
    config = EngineConfig(
        model="random",
        max_model_len=plan.max_model_len,
        max_logprobs=0,
        cache=CacheConfig(num_pages=plan.num_pages),
        scheduler=SchedulerConfig(max_rows=plan.rows, max_step_tokens=plan.step_tokens),
    )
    free()
    rank = replace(shard_shaped(shape, tp), num_layers=layers)
    ready = prepare_random(config, rank, buckets=plan.buckets, measure_sampling=True)
    source = f"measured, one device with {plan.layers} layers of one rank, t = {tp}"
    shard = measure_shard(ready, depths=(_DEPTH,), repeats=1, source=source)
    return replace(shard, tp=tp, is_shard_shaped=True)


def _carried_steps(shallow: StepTable, deep: StepTable, *, layers: tuple[int, int, int]) -> StepTable:
    first, second, wanted = layers
    further = (wanted - second) / (second - first)
    return StepTable(
        buckets=tuple(
            replace(two, step_s=two.step_s + further * max(two.step_s - one.step_s, 0.0))
            for one, two in zip(shallow.buckets, deep.buckets, strict=True)
        ),
        row_pair_s=deep.row_pair_s * wanted / second,
        chunk_pair_s=deep.chunk_pair_s * wanted / second,
    )


def _note(check: Check, model: str, shard: Shard) -> None:
    for bucket in _steps(shard.loops).buckets:
        metric = "decode step" if bucket.is_decode else "mixed step"
        case = f"a rank of {shard.tp}, {bucket.tokens} tokens, {bucket.rows} rows"
        check.figures.add(model, case, metric=metric, unit="ms", samples=[1e3 * bucket.step_s])


def _steps(loops: Sequence[LoopTerms]) -> StepTable:
    (loop,) = loops
    return loop.steps


def _write(check: Check, model: str, shards: Sequence[Shard]) -> Path:
    plan, device = _PLANS[check.small], device_here(on_cpu=check.on_cpu)
    check.output.mkdir(parents=True, exist_ok=True)
    path = check.output / f"calibration-{model}-{device.label}.json"
    calibration = Calibration(
        model=model,
        dtype="the default of the device",
        device=device.name,
        source=(
            f"scripts/gpu_check.sh, carried on from {plan.layers} layers, few sizes of steps, "
            f"jax {versions(['jax'])['jax']}"
        ),
        shards=tuple(shards),
    )
    write_calibration(calibration, path)
    return path
