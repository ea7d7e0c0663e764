"""What a way to sample costs each rank: operations and bytes of its compiled program on given rows.

How often loops turn and which branches are taken depends on the rows. So the program is run once under a
profiler: costs are those of each instruction (`arithmetic`, `collectives`) times its runs in the trace.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Float

from albireo_jax.sampling.draw import SamplerParams
from albireo_jax.sampling.routes import Route, sample_by
from benchmarks.lib.hlo import parse
from benchmarks.lib.hlo_collectives import collectives
from benchmarks.lib.hlo_operations import operations
from benchmarks.lib.run_counts import count_runs

_AXIS = "tp"
_BY_VOCAB, _EVERYWHERE = PartitionSpec(None, _AXIS), PartitionSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows to sample, laid out over the ranks."""

    logits_RV: Float[Array, "R V"]
    params: SamplerParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCost:
    """Mean over the ranks of one execution.

    `moved_bytes` are of the collectives that ran; `unmoved_bytes` of those that the program has for rows
    other than these, each once.
    """

    operations: float
    moved_bytes: float
    unmoved_bytes: int


def ranks_mesh(ranks: int) -> Mesh:
    """One rank on each of the first devices."""
    return Mesh(np.array(jax.devices()[:ranks]), (_AXIS,), axis_types=(AxisType.Auto,))


def peaked_batch(
    mesh: Mesh, *, rows: int, vocab: int, temperature: float, top_p: float = 1.0, flat_rows: int = 0
) -> Batch:
    """Normal logits with standard deviations from 5 to 8 (the first rows' are 0.1), one seed per row.

    At temperature 0.8, these leave few tokens in a nucleus of 0.9, and the flat ones most of the vocabulary.
    """
    spread_R = np.linspace(5, 8, rows, dtype=np.float32)
    spread_R[:flat_rows] = 0.1
    logits_RV = np.random.default_rng(0).standard_normal((rows, vocab), np.float32) * spread_R[:, None]
    params = SamplerParams(
        temperature_R=jnp.full(rows, temperature, jnp.float32),
        top_k_R=jnp.zeros(rows, jnp.int32),
        top_p_R=jnp.full(rows, top_p, jnp.float32),
        min_p_R=jnp.zeros(rows, jnp.float32),
        seed_R2=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1),
        position_R=jnp.full(rows, 100, jnp.int32),
    )
    return Batch(
        logits_RV=jax.device_put(logits_RV, NamedSharding(mesh, _BY_VOCAB)),
        params=jax.device_put(params, NamedSharding(mesh, _EVERYWHERE)),
    )


def compile_route(route: Route, batch: Batch, mesh: Mesh) -> Compiled:
    """The program that samples batches of this shape; it is called with logits and parameters."""
    stage = jax.shard_map(
        partial(sample_by, route, axis=_AXIS),
        mesh=mesh,
        in_specs=(_BY_VOCAB, _EVERYWHERE),
        out_specs=_EVERYWHERE,
        check_vma=False,
    )
    return jax.jit(stage).lower(batch.logits_RV, batch.params).compile()


def route_cost(compiled: Compiled, batch: Batch) -> RouteCost:
    """What the program does on each rank for these rows, on CPU devices only.

    Raises RuntimeError if the trace lacks a collective that must have run on every rank.
    """
    program = parse(compiled.as_text() or "")
    runs = count_runs(lambda: compiled(batch.logits_RV, batch.params))
    ranks = len(batch.logits_RV.sharding.device_set)
    sent = collectives(program)
    for one in sent:
        if not one.within and runs[one.name] != ranks:
            raise RuntimeError(
                f"{one.name} runs once on each of {ranks} ranks, but {runs[one.name]} times in the trace"
            )
    return RouteCost(
        operations=operations(program, runs) / ranks,
        moved_bytes=sum(one.result_bytes * runs[one.name] for one in sent) / ranks,
        unmoved_bytes=sum(one.result_bytes for one in sent if runs[one.name] == 0),
    )
