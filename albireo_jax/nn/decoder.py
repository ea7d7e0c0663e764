"""A decoder-only transformer as pure functions of a flat tuple of stacked arrays.

The functions know nothing of schedules, caches or samplers: attention comes in as a callback that
also carries the cache. It is given projections as the layer's product gives them (`Projected`): what lies
between the product and attention is `queries_keys_values`, or a kernel that does the same and writes the
cache too. The functions run in two ways, which give the same numbers. With `axis` None, arrays
are whole (or sharded by the compiler). With the name of a mesh axis, they run inside a `shard_map`
over it on this rank's share of the heads, of the feed-forward width and of the vocabulary, and a
forward pass is exactly 2 L + 1 all-reduces.

The layer loop has two forms. *Scanned* compiles one layer whatever the depth; the cache is in the
carry, because as a scanned input and output it would be copied whole. *Unrolled* compiles all
layers with static indices, and on a GPU reads the stacked weights where they are. A stacked field
may also be a tuple of L arrays, for unrolled loops: no layer is ever sliced out, at the price of more
arguments per call. A CPU would copy the slices; a GPU reads them in place, but each makes its product
another program, which XLA tunes by itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, Real

from albireo_jax.core.config import Quantization
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.fp8 import ProductRows
from albireo_jax.nn.layers import (
    Rotation,
    embed,
    gated_mlp,
    linear,
    rms_norm,
    rope_frequencies,
    rotate,
    rotation,
    rotation_factor,
)
from albireo_jax.nn.sharding import partition_spec

Layered: TypeAlias = Array | tuple[Array, ...]
"""One array with a leading axis L, or the L arrays one by one."""

LayerIndex: TypeAlias = int | Int32[Array, ""]
"""A number in an unrolled loop, a traced scalar in a scanned one."""

Cache = TypeVar("Cache")


class DecoderWeights(NamedTuple):
    """All weights of a decoder; the suffixes are the axes (`nn.axes`), input before output.

    X is G query heads, then their key head, then their value head. Absent where the model has none:
    `bqkv_LNXK`, `q_norm_LK`, `k_norm_LK`, and `lm_head_VD`, which is then `embed_VD`. Scales are there if
    the four matrices of a layer are codes (`nn.quantise`).
    """

    embed_VD: Array
    attention_norm_LD: Layered
    wqkv_LDNXK: Layered
    wo_LAD: Layered
    mlp_norm_LD: Layered
    w_gate_up_LD2F: Layered
    w_down_LFD: Layered
    final_norm_D: Array
    bqkv_LNXK: Layered | None = None
    q_norm_LK: Layered | None = None
    k_norm_LK: Layered | None = None
    lm_head_VD: Array | None = None
    wqkv_scale_LNXK: Layered | None = None
    wo_scale_LD: Layered | None = None
    w_gate_up_scale_L2F: Layered | None = None
    w_down_scale_LD: Layered | None = None


class Head(NamedTuple):
    """Weights from hidden states to logits: the final norm, and the head or the embedding it is tied to."""

    norm_D: Float[Array, " D"]
    head_VD: Float[Array, "V D"]


class LayerWeights(NamedTuple):
    """The weights of one layer."""

    attention_norm_D: Float[Array, " D"]
    wqkv_DNXK: Real[Array, "D N X K"]
    wo_AD: Real[Array, "A D"]
    mlp_norm_D: Float[Array, " D"]
    w_gate_up_D2F: Real[Array, "D 2 F"]
    w_down_FD: Real[Array, "F D"]
    bqkv_NXK: Float[Array, "N X K"] | None
    q_norm_K: Float[Array, " K"] | None
    k_norm_K: Float[Array, " K"] | None
    wqkv_scale_NXK: Float[Array, "N X K"] | None
    wo_scale_D: Float[Array, " D"] | None
    w_gate_up_scale_2F: Float[Array, "2 F"] | None
    w_down_scale_D: Float[Array, " D"] | None


class Projected(NamedTuple):
    """A layer's queries, keys and values of T tokens before bias, norms and rotation, and what these need."""

    qkv_TNXK: Float[Array, "T N X K"]
    bias_NXK: Float[Array, "N X K"] | None
    q_norm_K: Float[Array, " K"] | None
    k_norm_K: Float[Array, " K"] | None
    eps: float
    by: Rotation


AttendFn: TypeAlias = Callable[[LayerIndex, Projected, Cache], tuple[Array, Cache]]
"""attend(layer, projected, cache) -> (o_TNGK, cache): scaling and masking are its own."""


@runtime_checkable
class AddNormFn(Protocol):
    """The sum of a residual and what a layer adds to it, if anything yet, and the norm of that sum."""

    def __call__(
        self, x_TD: Array, added_TD: Array | None, weight_D: Array, *, eps: float
    ) -> tuple[Array, Array]:
        """(x_TD + added_TD, its norm)."""
        ...


class QueriesKeysValues(NamedTuple):
    """The inputs of attention: queries and keys rotated to their positions, and values."""

    q_TNGK: Float[Array, "T N G K"]
    k_TNK: Float[Array, "T N K"]
    v_TNK: Float[Array, "T N K"]


def add_norm(
    x_TD: Float[Array, "T D"],
    added_TD: Float[Array, "T D"] | None,
    weight_D: Float[Array, " D"],
    *,
    eps: float,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """An `AddNormFn` of operations that XLA fuses as it can."""
    if added_TD is not None:
        x_TD = x_TD + added_TD
    return x_TD, rms_norm(x_TD, weight_D, eps)


def forward(
    config: ModelConfig,
    weights: DecoderWeights,
    token_T: Int32[Array, " T"],
    *,
    position_T: Int32[Array, " T"],
    cache: Cache,
    attend: AttendFn[Cache],
    add_norm: AddNormFn = add_norm,
    axis: str | None = None,
    unroll: bool = False,
    fp8_rows: ProductRows = ProductRows.ROUNDED,
) -> tuple[Float[Array, "T D"], Cache]:
    """Hidden states of T tokens after the last layer (before the final norm), and the new cache.

    `unroll` picks the form of the layer loop; unstacked weights must be unrolled. A residual is handed to
    `add_norm` together with what is added to it: in an unrolled loop what a layer adds at its end, too.
    `fp8_rows` is the form in which rows enter products where the model rounds them.
    """
    rows = fp8_rows if config.quantization is Quantization.FP8 else ProductRows.FLOATS
    scaling = config.rope_scaling
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    by = rotation(position_T, frequencies, factor=rotation_factor(scaling))
    how = _How(config, by, add_norm, axis, rows)

    def step(layer: LayerIndex, state: _Residual, cache: Cache) -> tuple[_Residual, Cache]:
        return _layer(how, layer_weights(weights, layer), layer, state=state, cache=cache, attend=attend)

    def scanned_step(layer: LayerIndex, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        state, cache = step(layer, _Residual(carry[0]), carry[1])
        return state.total, cache

    state = _Residual(embed(weights.embed_VD, token_T, axis=axis))
    if not unroll:
        return jax.lax.fori_loop(0, config.num_layers, scanned_step, (state.total, cache))
    for layer in range(config.num_layers):
        state, cache = step(layer, state, cache)
    return state.total, cache


def head(weights: DecoderWeights) -> Head:
    """The weights that `logits` needs."""
    return Head(weights.final_norm_D, weights.embed_VD if weights.lm_head_VD is None else weights.lm_head_VD)


def logits(
    config: ModelConfig,
    head: Head,
    hidden_RD: Float[Array, "R D"],
    *,
    axis: str | None = None,
) -> Float[Array, "R v"]:
    """Float32 logits of R hidden states over this rank's share of the vocabulary.

    Ids that only pad the vocabulary to a multiple of the ranks get minus infinity.
    """
    x_RD = rms_norm(hidden_RD, head.norm_D, config.rms_norm_eps)
    over_D = (((1,), (1,)), ((), ()))
    logits_Rv = jax.lax.dot_general(x_RD, head.head_VD, over_D, preferred_element_type=jnp.float32)
    share = head.head_VD.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * share
    ranks = 1 if axis is None else jax.lax.axis_size(axis)
    if share * ranks == config.vocab_size:
        return logits_Rv
    is_token_v = first + jnp.arange(share) < config.vocab_size
    return jnp.where(is_token_v[None, :], logits_Rv, -jnp.inf)


def layer_weights(weights: DecoderWeights, layer: LayerIndex) -> LayerWeights:
    """The weights of one layer, out of stacked or unstacked fields."""
    return LayerWeights(
        attention_norm_D=_pick(weights.attention_norm_LD, layer),
        wqkv_DNXK=_pick(weights.wqkv_LDNXK, layer),
        wo_AD=_pick(weights.wo_LAD, layer),
        mlp_norm_D=_pick(weights.mlp_norm_LD, layer),
        w_gate_up_D2F=_pick(weights.w_gate_up_LD2F, layer),
        w_down_FD=_pick(weights.w_down_LFD, layer),
        bqkv_NXK=_pick_any(weights.bqkv_LNXK, layer),
        q_norm_K=_pick_any(weights.q_norm_LK, layer),
        k_norm_K=_pick_any(weights.k_norm_LK, layer),
        wqkv_scale_NXK=_pick_any(weights.wqkv_scale_LNXK, layer),
        wo_scale_D=_pick_any(weights.wo_scale_LD, layer),
        w_gate_up_scale_2F=_pick_any(weights.w_gate_up_scale_L2F, layer),
        w_down_scale_D=_pick_any(weights.w_down_scale_LD, layer),
    )


def queries_keys_values(projected: Projected) -> QueriesKeysValues:
    """The inputs of attention, out of a layer's projections."""
    qkv_TNXK = projected.qkv_TNXK
    if projected.bias_NXK is not None:
        qkv_TNXK = qkv_TNXK + projected.bias_NXK[None]
    q_TNGK, k_TNK, v_TNK = qkv_TNXK[:, :, :-2], qkv_TNXK[:, :, -2], qkv_TNXK[:, :, -1]
    if projected.q_norm_K is not None and projected.k_norm_K is not None:
        q_TNGK = rms_norm(q_TNGK, projected.q_norm_K, projected.eps)
        k_TNK = rms_norm(k_TNK, projected.k_norm_K, projected.eps)
    return QueriesKeysValues(rotate(q_TNGK, projected.by), rotate(k_TNK, projected.by), v_TNK)


def weight_specs(weights: DecoderWeights) -> DecoderWeights:
    """Partition specs of `weights`, as `shard_map` takes them: same structure, specs for arrays."""

    def spec(name: str, field: Layered | None) -> Any:
        whole = partition_spec(name)
        if isinstance(field, tuple):
            return (PartitionSpec(*whole[1:]),) * len(field)
        return None if field is None else whole

    return DecoderWeights(*(spec(name, field) for name, field in weights._asdict().items()))


def head_specs() -> Head:
    """Partition specs of a `Head`."""
    return Head(partition_spec("final_norm_D"), partition_spec("lm_head_VD"))  # type: ignore[arg-type]


def unstack(weights: DecoderWeights) -> DecoderWeights:
    """The same weights with each stacked field as a tuple of one array per layer (copies).

    Fields that are tuples already stay as they are.
    """

    def split(name: str, field: Layered | None) -> Any:
        if not has_layers(name) or field is None or isinstance(field, tuple):
            return field
        return tuple(field[layer] for layer in range(field.shape[0]))

    return DecoderWeights(*(split(name, field) for name, field in weights._asdict().items()))


def is_unstacked(weights: DecoderWeights) -> bool:
    """Whether the weights are one array per layer."""
    return isinstance(weights.attention_norm_LD, tuple)


def _pick(field: Layered, layer: LayerIndex) -> Array:
    if isinstance(layer, int):
        return field[layer]
    if isinstance(field, tuple):
        raise ValueError("unstacked weights need the unrolled layer loop")
    return jax.lax.dynamic_index_in_dim(field, layer, keepdims=False)


def _pick_any(field: Layered | None, layer: LayerIndex) -> Array | None:
    return None if field is None else _pick(field, layer)


class _How(NamedTuple):
    """The settings that all layers share."""

    config: ModelConfig
    by: Rotation
    add_norm: AddNormFn
    axis: str | None
    rows: ProductRows


class _Residual(NamedTuple):
    """The residual of T tokens, and what is still to be added to it."""

    x_TD: Float[Array, "T D"]
    added_TD: Float[Array, "T D"] | None = None

    @property
    def total(self) -> Float[Array, "T D"]:
        """The residual with what is to be added."""
        return self.x_TD if self.added_TD is None else self.x_TD + self.added_TD


def _layer(
    how: _How,
    weights: LayerWeights,
    layer: LayerIndex,
    *,
    state: _Residual,
    cache: Cache,
    attend: AttendFn[Cache],
) -> tuple[_Residual, Cache]:
    eps = how.config.rms_norm_eps
    with jax.named_scope("projections"):
        x_TD, normed_TD = how.add_norm(*state, weights.attention_norm_D, eps=eps)
        projected = _project(how, weights, normed_TD)
    with jax.named_scope("attention"):
        o_TNGK, cache = attend(layer, projected, cache)
    with jax.named_scope("projections"):
        o_TA = o_TNGK.reshape(len(o_TNGK), -1)
        out_TD = _sum(linear(o_TA, weights.wo_AD, scale_F=weights.wo_scale_D, rows=how.rows), how.axis)
    with jax.named_scope("mlp"):
        x_TD, normed_TD = how.add_norm(x_TD, out_TD, weights.mlp_norm_D, eps=eps)
        out_TD = gated_mlp(
            normed_TD,
            weights.w_gate_up_D2F,
            weights.w_down_FD,
            gate_up_scale_2F=weights.w_gate_up_scale_2F,
            down_scale_D=weights.w_down_scale_D,
            rows=how.rows,
        )
        return _Residual(x_TD, _sum(out_TD, how.axis)), cache


def _project(how: _How, weights: LayerWeights, x_TD: Float[Array, "T D"]) -> Projected:
    width, *heads = weights.wqkv_DNXK.shape
    scale_NXK = weights.wqkv_scale_NXK
    flat_scale = None if scale_NXK is None else scale_NXK.reshape(-1)
    wqkv_DF = weights.wqkv_DNXK.reshape(width, -1)
    qkv_TNXK = linear(x_TD, wqkv_DF, scale_F=flat_scale, rows=how.rows).reshape(-1, *heads)
    eps = how.config.rms_norm_eps
    return Projected(qkv_TNXK, weights.bqkv_NXK, weights.q_norm_K, weights.k_norm_K, eps, how.by)


def _sum(partial: Array, axis: str | None) -> Array:
    return partial if axis is None else jax.lax.psum(partial, axis)
