"""A decoder at rest: the flax.nnx module that holds the sharded weights and runs them densely."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from albireo_jax.core.config import ModelConfig
from albireo_jax.core.errors import WeightError
from albireo_jax.nn.axes import logical_axes
from albireo_jax.nn.decoder import (
    DecoderWeights,
    Layered,
    LayerIndex,
    Projected,
    forward,
    head,
    logits,
    queries_keys_values,
)
from albireo_jax.nn.layers import causal_attention
from albireo_jax.nn.quantise import quantised_stack, weight_dtypes
from albireo_jax.nn.shapes import SCALES, layer_name, weight_shapes
from albireo_jax.nn.sharding import SHARDING_RULES, TP, named_sharding


class Decoder(nnx.Module):
    """A decoder-only transformer whose weights lie sharded on a mesh.

    Each weight is an `nnx.Param` named as in `DecoderWeights`, with its logical axes as sharding
    metadata, so that `nnx.state`, `nnx.grad` and optimizers see an ordinary module. Calling it gives the
    logits of a whole text; an engine runs `weights()` through its own attention instead.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, mesh: Mesh) -> None:
        """Hold stacked arrays that lie on `mesh`; WeightError if one is not as `config` says."""
        self.config = config
        self.mesh = mesh
        arrays = _present(weights)
        shapes = weight_shapes(config, mesh.shape[TP])
        dtypes = weight_dtypes(config, weights.embed_VD.dtype)
        missing = [name for name in shapes if name not in arrays]
        if missing:
            raise WeightError(f"weights lack {', '.join(missing)}")
        for name, array in arrays.items():
            _check(name, array, shape=shapes.get(name), dtype=dtypes.get(name))
        self.embed_VD = _param("embed_VD", weights.embed_VD)
        self.attention_norm_LD = _param("attention_norm_LD", weights.attention_norm_LD)
        self.wqkv_LDNXK = _param("wqkv_LDNXK", weights.wqkv_LDNXK)
        self.wo_LAD = _param("wo_LAD", weights.wo_LAD)
        self.mlp_norm_LD = _param("mlp_norm_LD", weights.mlp_norm_LD)
        self.w_gate_up_LD2F = _param("w_gate_up_LD2F", weights.w_gate_up_LD2F)
        self.w_down_LFD = _param("w_down_LFD", weights.w_down_LFD)
        self.final_norm_D = _param("final_norm_D", weights.final_norm_D)
        self.bqkv_LNXK = _optional("bqkv_LNXK", weights.bqkv_LNXK)
        self.q_norm_LK = _optional("q_norm_LK", weights.q_norm_LK)
        self.k_norm_LK = _optional("k_norm_LK", weights.k_norm_LK)
        self.lm_head_VD = _optional("lm_head_VD", weights.lm_head_VD)
        self.wqkv_scale_LNXK = _optional("wqkv_scale_LNXK", weights.wqkv_scale_LNXK)
        self.wo_scale_LD = _optional("wo_scale_LD", weights.wo_scale_LD)
        self.w_gate_up_scale_L2F = _optional("w_gate_up_scale_L2F", weights.w_gate_up_scale_L2F)
        self.w_down_scale_LD = _optional("w_down_scale_LD", weights.w_down_scale_LD)

    def __call__(self, token_ids: object) -> Float[Array, "*batch T V"]:
        """Float32 logits of every position of a text [T] or of several [B, T], by dense causal attention.

        The ids are a list or an array of any library. Compiled once per shape. Differentiable unless it is
        quantised. Raises ValueError for another shape, and for ids that are no integers or outside the
        vocabulary, except where they are traced.
        """
        tokens = _tokens(token_ids, vocab_size=self.config.vocab_size)
        if tokens.ndim == 1:
            return _dense_logits(self.config, self.weights(), tokens)
        return jax.vmap(partial(_dense_logits, self.config, self.weights()))(tokens)

    def weights(self) -> DecoderWeights:
        """The arrays as they are now, as one flat tuple for `jax.jit` and `shard_map`."""
        return DecoderWeights(**nnx.to_pure_dict(nnx.state(self, nnx.Param)))

    def replace_weights(self, tree: DecoderWeights | Mapping[str, Any]) -> None:
        """Take new arrays for all or some weights, by name, copied to where the old ones lie.

        `tree` is a `DecoderWeights`, an `nnx.State` of such a module, or a mapping of names to arrays. To a
        quantised model it may bring a matrix as codes, with their scales, or as floats, which become codes.
        Raises WeightError, before anything is replaced, for a name that the model lacks, and for an array of
        another shape or dtype or one that was deleted.
        """
        old = nnx.state(self, nnx.Param)
        new = _named_arrays(tree)
        current = _present(self.weights())
        uncoded = [name for name in new if self._takes_floats(name, new[name])]
        for name, array in new.items():
            dtype = (
                self.embed_VD.dtype if name in uncoded else current[name].dtype if name in current else None
            )
            shape = current[name].shape if name in current else None
            _check(name, array, shape=shape, dtype=dtype)
        # device_put may share buffers with arrays that the caller will donate or delete
        moved = {
            name: jnp.copy(jax.device_put(array, named_sharding(self.mesh, name)))
            for name, array in new.items()
            if name not in uncoded
        }
        for name in uncoded:
            moved |= quantised_stack(
                self.config, name, partial(self._layer_of, name, new[name]), mesh=self.mesh
            )
        nnx.replace_by_pure_dict(old, moved)
        nnx.update(self, old)

    def _takes_floats(self, name: str, array: Any) -> bool:
        """Whether an array brings floats where this model keeps codes."""
        is_coded = self.config.quantization is not None and name in SCALES
        return is_coded and isinstance(array, jax.Array | np.ndarray) and array.dtype == self.embed_VD.dtype

    def _layer_of(self, name: str, array: Any, layer: int) -> Array:
        return jax.device_put(array[layer], named_sharding(self.mesh, layer_name(name)))


def _tokens(token_ids: object, *, vocab_size: int) -> Int32[Array, "*batch T"]:
    """Token ids as an array, checked as far as their values are known."""
    wanted = "token ids must be integers of shape [T] or [B, T]"
    try:
        array = token_ids if isinstance(token_ids, jax.Array) else np.asarray(token_ids)
    except (TypeError, ValueError) as error:  # lists of different lengths
        raise ValueError(f"{wanted}, got {token_ids!r:.200}") from error
    if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "iu":
        raise ValueError(f"{wanted}, got an array of {array.dtype} of shape {list(array.shape)}")
    if not isinstance(array, Tracer):
        ids = np.asarray(array)
        for token in (int(ids.min()), int(ids.max())):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size}")
    return jnp.asarray(array, jnp.int32)


def _present(weights: DecoderWeights) -> dict[str, Any]:
    return {name: array for name, array in weights._asdict().items() if array is not None}


def _named_arrays(tree: object) -> dict[str, Any]:
    """Arrays by name, from any form that `Decoder.replace_weights` takes."""
    if isinstance(tree, DecoderWeights):
        return _present(tree)
    if not isinstance(tree, Mapping | nnx.State):
        raise WeightError(f"weights must be a mapping of names to arrays, got a {type(tree).__name__}")
    return {str(name): array for name, array in nnx.to_pure_dict(nnx.State(tree)).items()}


def _check(name: str, array: object, *, shape: tuple[int, ...] | None, dtype: jnp.dtype | None) -> None:
    if shape is None:
        raise WeightError(f"the model has no weight {name}")
    if not isinstance(array, jax.Array | np.ndarray):
        raise WeightError(f"{name} is a {type(array).__name__}, expected one stacked array")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise WeightError(f"{name} was deleted, or donated to another computation")
    if array.shape != shape or array.dtype != dtype:
        raise WeightError(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")


def _param(name: str, array: Layered) -> nnx.Param[Any]:
    return nnx.Param(
        array,
        out_sharding=logical_axes(name),
        sharding_rules=SHARDING_RULES,
        eager_sharding=False,  # the array already lies where it belongs
    )


def _optional(name: str, array: Layered | None) -> nnx.Param[Any] | None:
    return None if array is None else _param(name, array)


@partial(jax.jit, static_argnums=0)
def _dense_logits(
    config: ModelConfig, weights: DecoderWeights, token_T: Int32[Array, " T"]
) -> Float[Array, "T V"]:
    def attend(_: LayerIndex, projected: Projected, cache: None) -> tuple[Array, None]:
        q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
        return causal_attention(q_TNGK, k_TNK, v_TNK, sliding_window=config.sliding_window), cache

    position_T = jnp.arange(token_T.shape[0], dtype=jnp.int32)
    hidden_TD, _ = forward(config, weights, token_T, position_T=position_T, cache=None, attend=attend)
    return logits(config, head(weights), hidden_TD)[:, : config.vocab_size]
