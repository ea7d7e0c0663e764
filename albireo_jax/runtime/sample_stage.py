"""How long the sampling stage takes by itself, so that a step's device time can be split into T3 and T4.

The step is one fused program, and a device reports only when it ends. So the stage is compiled alone,
with logits sharded as the model leaves them, and timed once per row bucket: for rows that are all
greedy, and for rows that are drawn (temperature 0.8, top-p 0.9).
"""

import statistics
import time
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from albireo_jax.core.types import MAX_STOP_IDS
from albireo_jax.runtime.step import StepProgram, sample_rows
from albireo_jax.sampling.sample import SamplerParams

_REPEATS = 5


class SamplingTimes(NamedTuple):
    """Median seconds of the sampling stage of one row bucket."""

    greedy_s: float
    drawn_s: float


def measure_sampling(program: StepProgram, row_counts: Iterable[int]) -> dict[int, SamplingTimes]:
    """Times of the sampling stage, for each number of rows."""
    return {rows: _measure(program, rows) for rows in row_counts}


def _measure(program: StepProgram, rows: int) -> SamplingTimes:
    vocab = program.model.padded_vocab_size(program.mesh.size)
    by_vocab = PartitionSpec(None, program.axis)
    stage = jax.jit(
        jax.shard_map(
            partial(sample_rows, program),
            mesh=program.mesh,
            in_specs=(by_vocab, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    logits_RV = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (rows, vocab)),
        out_shardings=NamedSharding(program.mesh, by_vocab),
    )()
    return SamplingTimes(
        greedy_s=_median_s(stage, logits_RV, _params(rows, temperature=0.0, top_p=1.0)),
        drawn_s=_median_s(stage, logits_RV, _params(rows, temperature=0.8, top_p=0.9)),
    )


def _median_s(stage: jax.stages.Wrapped, logits_RV: jax.Array, params: SamplerParams) -> float:
    def once() -> float:
        started_s = time.perf_counter()
        jax.block_until_ready(stage(logits_RV, params))
        return time.perf_counter() - started_s

    once()
    return statistics.median(once() for _ in range(_REPEATS))


def _params(rows: int, *, temperature: float, top_p: float) -> SamplerParams:
    return SamplerParams(
        temperature_R=jnp.full(rows, temperature, jnp.float32),
        top_k_R=jnp.zeros(rows, jnp.int32),
        top_p_R=jnp.full(rows, top_p, jnp.float32),
        min_p_R=jnp.zeros(rows, jnp.float32),
        seed_R2=jnp.asarray(np.stack([np.zeros(rows), np.arange(rows)], axis=1), jnp.uint32),
        position_R=jnp.full(rows, 64, jnp.int32),
        banned_until_R=jnp.zeros(rows, jnp.int32),
        stop_id_RB=jnp.full((rows, MAX_STOP_IDS), -1, jnp.int32),
    )
