"""Sampling inside a `shard_map`: logits come split over the vocabulary, ids leave on every rank.

*Sharded* divides the work by the number of ranks t: one all-to-all trades vocabulary shards for row
shards, each rank samples its R / t rows with the ordinary sampler, one all-gather returns the ids::

    R rows × V/t  ──all-to-all──▶  R/t rows × V  ──sample──▶  R/t ids  ──all-gather──▶  R ids

*Replicated* is what it is measured against: every rank gathers all logits and samples every row. A token is a
function of its row only (`sampling.sample`), so both give the same ids, for any t.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from albireo_jax.sampling.sample import SamplerParams, sample


def sample_sharded(logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str) -> Int32[Array, " R"]:
    """Ids of all rows on every rank, each row sampled on one; `axis` names the mesh axis.

    Shards follow each other in rank order. Rows are padded with greedy ones to a multiple of the ranks.
    """
    ranks = lax.axis_size(axis)
    if ranks == 1:
        return sample(logits_Rv, params)
    rows = logits_Rv.shape[0]
    own_rows = -(-rows // ranks)
    first = lax.axis_index(axis) * own_rows

    def pad(array_R: Array) -> Array:
        return jnp.pad(array_R, [(0, own_rows * ranks - rows)] + [(0, 0)] * (array_R.ndim - 1))

    def own(array_R: Array) -> Array:
        return lax.dynamic_slice_in_dim(pad(array_R), first, own_rows)

    logits_rV = lax.all_to_all(pad(logits_Rv), axis, split_axis=0, concat_axis=1, tiled=True)
    id_r = sample(logits_rV, jax.tree.map(own, params))
    return lax.all_gather(id_r, axis, tiled=True)[:rows]


def sample_replicated(
    logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str
) -> Int32[Array, " R"]:
    """Ids of all rows, sampled on every rank from gathered logits: the baseline."""
    if lax.axis_size(axis) == 1:
        return sample(logits_Rv, params)
    return sample(lax.all_gather(logits_Rv, axis, axis=1, tiled=True), params)
