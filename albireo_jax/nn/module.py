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

from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import logical_axes
from albireo_jax.nn.decoder import (
    DecoderWeights,
    Layered,
    LayerIndex,
    Projected,
    forward,
    head,
    is_unstacked,
    logits,
    queries_keys_values,
)
from albireo_jax.nn.fields import check_field, copy_field, layer_on_mesh, layered
from albireo_jax.nn.layers import causal_attention
from albireo_jax.nn.quantise import quantised, weight_dtypes
from albireo_jax.nn.shapes import SCALES, layer_name, weight_shapes
from albireo_jax.nn.sharding import SHARDING_RULES, TP


class Decoder(nnx.Module):
    """A decoder-only transformer whose weights lie sharded on a mesh.

    Each weight is an `nnx.Param` named as in `DecoderWeights`, with its logical axes as sharding
    metadata, so that `nnx.state`, `nnx.grad` and optimizers see an ordinary module. One that is unstacked
    is an `nnx.List` of a param for each layer: in `nnx.state`, `("w_down_LFD", 3)` is that of layer 3.
    Calling the module gives the logits of a whole text; an engine runs `weights()` through its own attention
    instead.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, mesh: Mesh) -> None:
        """Hold arrays that lie on `mesh`, stacked or not; WeightError if one is not as `config` says."""
        self.config = config
        self.mesh = mesh
        arrays = _present(weights)
        shapes = weight_shapes(config, mesh.shape[TP])
        dtypes = weight_dtypes(config, weights.embed_VD.dtype)
        missing = [name for name in shapes if name not in arrays]
        if missing:
            raise WeightError(f"weights lack {', '.join(missing)}")
        for name, array in arrays.items():
            check_field(name, array, shape=shapes.get(name), dtype=dtypes.get(name))
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

        The ids are a list or an array of any library. Compiled once per shape, after which an engine on GPUs
        records its CUDA graphs again. Differentiable unless it is quantised. Raises ValueError for another
        shape, and for ids that are no integers or outside the vocabulary, except where they are traced.
        """
        tokens = _tokens(token_ids, vocab_size=self.config.vocab_size)
        if tokens.ndim == 1:
            return _dense_logits(self.config, self.weights(), tokens)
        return jax.vmap(partial(_dense_logits, self.config, self.weights()))(tokens)

    def weights(self) -> DecoderWeights:
        """The arrays as they are now, as one flat tuple for `jax.jit` and `shard_map`."""
        fields: dict[str, Any] = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        return DecoderWeights(**{name: layered(field) for name, field in fields.items()})

    def replace_weights(self, tree: DecoderWeights | Mapping[str, Any]) -> None:
        """Take new arrays for all or some weights, by name, copied to where the old ones lie.

        `tree` is a `DecoderWeights`, an `nnx.State` of such a module, or a mapping of names to arrays; a
        weight with layers is one array or a sequence of one for each layer, whichever form this module has.
        To a quantised model it may bring a matrix as codes, with their scales, or as floats, which become
        codes. Raises WeightError, before anything is replaced, for a name that the model lacks, and for an
        array of another shape or dtype or one that was deleted.
        """
        new = _named_arrays(tree)
        shapes = weight_shapes(self.config, self.mesh.shape[TP])
        dtypes = weight_dtypes(self.config, self.embed_VD.dtype)
        uncoded = [name for name in new if self._takes_floats(name, new[name])]
        for name, field in new.items():
            dtype = self.embed_VD.dtype if name in uncoded else dtypes.get(name)
            check_field(name, field, shape=shapes.get(name), dtype=dtype)
        form = LayerForm.UNSTACKED if is_unstacked(self.weights()) else LayerForm.STACKED
        moved: dict[str, Any] = {}
        for name, field in new.items():
            if name in uncoded:
                layer = partial(layer_on_mesh, name, field, mesh=self.mesh)
                moved |= quantised(self.config, name, layer, mesh=self.mesh, form=form)
            else:
                moved[name] = copy_field(name, field, mesh=self.mesh, form=form)
        old = nnx.state(self, nnx.Param)
        nnx.replace_by_pure_dict(old, {name: _by_number(field) for name, field in moved.items()})
        nnx.update(self, old)

    def _takes_floats(self, name: str, field: Any) -> bool:
        """Whether a field brings floats where this model keeps codes."""
        is_coded = self.config.quantization is not None and name in SCALES
        first = field[0] if isinstance(field, tuple) and field else field
        return is_coded and isinstance(first, jax.Array | np.ndarray) and first.dtype == self.embed_VD.dtype


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
    return {str(name): layered(field) for name, field in nnx.to_pure_dict(nnx.State(tree)).items()}


def _by_number(field: Layered) -> Any:
    """A field as `nnx` has it in a state: the layers of a tuple by their numbers."""
    return dict(enumerate(field)) if isinstance(field, tuple) else field


def _param(name: str, array: Layered) -> Any:
    """The param of an array, or a list of the params of layers; any type, as a dataclass field has one."""
    if isinstance(array, tuple):
        return nnx.List([_param(layer_name(name), layer) for layer in array])
    return nnx.Param(
        array,
        out_sharding=logical_axes(name),
        sharding_rules=SHARDING_RULES,
        eager_sharding=False,  # the array already lies where it belongs
    )


def _optional(name: str, array: Layered | None) -> Any:
    return None if array is None else _param(name, array)


@partial(jax.jit, static_argnums=0)
def _dense_logits(
    config: ModelConfig, weights: DecoderWeights, token_T: Int32[Array, " T"]
) -> Float[Array, "T V"]:
    def attend(_: LayerIndex, projected: Projected, cache: None) -> tuple[Array, None]:
        q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
        return causal_attention(q_TNGK, k_TNK, v_TNK, sliding_window=config.sliding_window), cache

    position_T = jnp.arange(token_T.shape[0], dtype=jnp.int32)
    unroll = is_unstacked(weights)
    hidden_TD, _ = forward(
        config, weights, token_T, position_T=position_T, cache=None, attend=attend, unroll=unroll
    )
    return logits(config, head(weights), hidden_TD)[:, : config.vocab_size]
