"""Sampling inside a `shard_map`: logits come split over the vocabulary, ids leave on every rank.

*All-to-all* divides the work by the number of ranks t: one all-to-all trades vocabulary shards for row
shards, each rank samples its R / t rows with the ordinary sampler, one all-gather returns the ids::

    R rows × V/t  ──all-to-all──▶  R/t rows × V  ──sample──▶  R/t ids  ──all-gather──▶  R ids

*Replicated* is what it is measured against: every rank gathers all logits and samples every row. A token is a
function of its row only (`sampling.sample`), so both give the same ids, for any t.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.sampling.filters import SamplerParams
from albireo_jax.sampling.sample import sample


def sample_all_to_all(
    logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str, launch: LaunchFn | None = None
) -> Int32[Array, " R"]:
    """Ids of all rows on every rank, each row sampled on one; `axis` names the mesh axis.

    Shards follow each other in rank order. Rows are padded with greedy ones to a multiple of the ranks.
    """
    if lax.axis_size(axis) == 1:
        return sample(logits_Rv, params, launch=launch)
    padded_Rv = pad_rows(logits_Rv, axis=axis)
    logits_rV = lax.all_to_all(padded_Rv, axis, split_axis=0, concat_axis=1, tiled=True)
    id_r = sample(logits_rV, jax.tree.map(partial(own_rows, axis=axis), params), launch=launch)
    return lax.all_gather(id_r, axis, tiled=True)[: logits_Rv.shape[0]]


def pad_rows(array_R: Shaped[Array, "R *any"], *, axis: str) -> Shaped[Array, "_ *any"]:
    """Rows of zeros appended up to a multiple of the ranks."""
    padding = -array_R.shape[0] % lax.axis_size(axis)
    return jnp.pad(array_R, [(0, padding)] + [(0, 0)] * (array_R.ndim - 1))


def own_rows(array_R: Shaped[Array, "R *any"], *, axis: str) -> Shaped[Array, "r *any"]:
    """A rank's share of the padded rows."""
    padded = pad_rows(array_R, axis=axis)
    share = padded.shape[0] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(padded, lax.axis_index(axis) * share, share)


def sample_replicated(
    logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str, launch: LaunchFn | None = None
) -> Int32[Array, " R"]:
    """Ids of all rows, sampled on every rank from gathered logits: the baseline."""
    if lax.axis_size(axis) == 1:
        return sample(logits_Rv, params, launch=launch)
    return sample(lax.all_gather(logits_Rv, axis, axis=1, tiled=True), params, launch=launch)
