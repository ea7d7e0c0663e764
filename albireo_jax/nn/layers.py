"""The parts of a decoder layer, as pure functions of arrays.

Norms and rotations are computed in float32 and returned in the dtype of their input; matrix products
run in the dtype of their rows, on two-dimensional views that cost nothing.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Real
from numpy.typing import NDArray

from albireo_jax.core.model_config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from albireo_jax.nn.fp8 import ProductRows, fp8_product


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each token turns each pair of channels."""

    cos_TH: Float[Array, "T H"]
    sin_TH: Float[Array, "T H"]


def linear(
    x_TD: Float[Array, "T D"],
    w_DF: Real[Array, "D F"],
    *,
    scale_F: Float[Array, " F"] | None = None,
    rows: ProductRows = ProductRows.FLOATS,
) -> Float[Array, "T F"]:
    """Product of T rows with a weight matrix that is stored input first.

    With `scale_F` the matrix is codes, and each of its columns stands for its multiple. The product is then
    accumulated and scaled in float32, and rounded once. `rows` is the form in which rows enter it.
    """
    if scale_F is None:
        return jnp.dot(x_TD, w_DF)
    if rows is not ProductRows.FLOATS:
        return fp8_product(x_TD, w_DF, scale_F=scale_F, rows=rows)
    y_TF = jnp.dot(x_TD, w_DF.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    return (y_TF * scale_F[None]).astype(x_TD.dtype)


def rms_norm(x: Float[Array, "*rows D"], weight_D: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Rows scaled to a root mean square of 1, times a weight per channel (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = weight_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale * weight).astype(x.dtype)


def gated_mlp(
    x_TD: Float[Array, "T D"],
    w_gate_up_D2F: Real[Array, "D 2 F"],
    w_down_FD: Real[Array, "F D"],
    *,
    gate_up_scale_2F: Float[Array, "2 F"] | None = None,
    down_scale_D: Float[Array, " D"] | None = None,
    rows: ProductRows = ProductRows.FLOATS,
) -> Float[Array, "T D"]:
    """SiLU-gated feed-forward: down(silu(gate(x)) * up(x)); a partial sum where F is this rank's share.

    Scales are those of matrices that are codes, and `rows` the form of rows, as in `linear`.
    """
    width = w_down_FD.shape[0]
    flat_scale = None if gate_up_scale_2F is None else gate_up_scale_2F.reshape(-1)
    gate_up = linear(x_TD, w_gate_up_D2F.reshape(-1, 2 * width), scale_F=flat_scale, rows=rows)
    hidden_TF = jax.nn.silu(gate_up[:, :width]) * gate_up[:, width:]
    return linear(hidden_TF, w_down_FD, scale_F=down_scale_D, rows=rows)


def causal_attention(
    q_TNGK: Float[Array, "T N G K"],
    k_TNK: Float[Array, "T N K"],
    v_TNK: Float[Array, "T N K"],
    *,
    sliding_window: int | None = None,
) -> Float[Array, "T N G K"]:
    """Grouped-query attention of a whole text over itself; memory grows with T squared.

    Scores are float32. A token sees itself and those before it, `sliding_window` in all at most.
    """
    num_tokens, _, _, width = q_TNGK.shape
    scores_NGTC = (
        jnp.einsum("TNGK,CNK->NGTC", q_TNGK, k_TNK, preferred_element_type=jnp.float32) * width**-0.5
    )
    distance_TC = jnp.arange(num_tokens)[:, None] - jnp.arange(num_tokens)[None, :]
    seen_TC = (distance_TC >= 0) & (distance_TC < (sliding_window or num_tokens))
    weight_NGTC = jax.nn.softmax(jnp.where(seen_TC[None, None], scores_NGTC, -jnp.inf), axis=-1)
    return jnp.einsum("NGTC,CNK->TNGK", weight_NGTC.astype(v_TNK.dtype), v_TNK)


def embed(
    embed_VD: Float[Array, "V D"], token_T: Int32[Array, " T"], *, axis: str | None = None
) -> Float[Array, "T D"]:
    """Embeddings of token ids; with a mesh `axis`, of a vocabulary that is split over its ranks.

    A sharded lookup is one all-reduce: each rank gives the rows that it has, and zeros for the others.
    """
    if axis is None:
        return jnp.take(embed_VD, token_T, axis=0, mode="clip")
    share = embed_VD.shape[0]
    local_T = token_T - jax.lax.axis_index(axis) * share
    mine_T = (local_T >= 0) & (local_T < share)
    x_TD = jnp.take(embed_VD, local_T, axis=0, mode="clip")
    return jax.lax.psum(jnp.where(mine_T[:, None], x_TD, 0), axis)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> NDArray[np.float32]:
    """Radians per position of the head_dim/2 rotated pairs of channels (arXiv 2104.09864)."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearRopeScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3RopeScaling):
        frequencies = _scale_llama3(frequencies, scaling)
    elif isinstance(scaling, YarnRopeScaling):
        frequencies = _scale_yarn(frequencies, scaling, theta=theta)
    return frequencies.astype(np.float32)


def rotation_factor(scaling: RopeScaling | None) -> float:
    """The factor by which a rotation multiplies queries and keys."""
    return scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1.0


def rotation(
    position_T: Int32[Array, " T"], frequencies: NDArray[np.float32], *, factor: float = 1.0
) -> Rotation:
    """Rotation of T tokens at their positions, the same for every layer; it multiplies by `factor` too."""
    angle_TH = position_T.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    cos_TH, sin_TH = jnp.cos(angle_TH), jnp.sin(angle_TH)
    return Rotation(cos_TH, sin_TH) if factor == 1.0 else Rotation(cos_TH * factor, sin_TH * factor)


def rotate(x: Float[Array, "T *heads K"], by: Rotation) -> Float[Array, "T *heads K"]:
    """Rotary position embedding of each head: channel i is paired with channel i + K/2."""
    half = x.shape[-1] // 2
    per_head = (x.shape[0],) + (1,) * (x.ndim - 2) + (half,)
    cos, sin = by.cos_TH.reshape(per_head), by.sin_TH.reshape(per_head)
    x32 = x.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _scale_llama3(frequencies: NDArray[np.float64], scaling: Llama3RopeScaling) -> NDArray[np.float64]:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, those between blended linearly."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(blend, 0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _scale_yarn(
    frequencies: NDArray[np.float64], scaling: YarnRopeScaling, *, theta: float
) -> NDArray[np.float64]:
    """YaRN: the first channels kept, the last slowed by `factor`, those between blended linearly."""
    pairs = len(frequencies)

    def channel(turns: float) -> float:
        """The channel, counted in pairs, that turns so often over the original context."""
        return pairs * math.log(scaling.original_max_position / (2 * math.pi * turns)) / math.log(theta)

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    slowed = np.clip((np.arange(pairs) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies
