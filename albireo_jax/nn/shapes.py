"""The shape of every weight: the one place where shapes depend on the tensor-parallel degree."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import axes_of
from albireo_jax.nn.decoder import DecoderWeights

_ALWAYS = (
    "embed_VD",
    "attention_norm_LD",
    "wqkv_LDNXK",
    "wo_LAD",
    "mlp_norm_LD",
    "w_gate_up_LD2F",
    "w_down_LFD",
    "final_norm_D",
)

SCALES: Mapping[str, str] = MappingProxyType(
    {
        "wqkv_LDNXK": "wqkv_scale_LNXK",
        "wo_LAD": "wo_scale_LD",
        "w_gate_up_LD2F": "w_gate_up_scale_L2F",
        "w_down_LFD": "w_down_scale_LD",
    }
)
"""Field that holds codes in a quantised model -> field of their scales, which lacks the axis of inputs."""


def axis_sizes(config: ModelConfig, tp: int) -> dict[str, int]:
    """Axis letter -> its size over all of `tp` ranks.

    Where there are more ranks than key/value heads, each head is replicated and its queries are
    split: N is `tp`, G is num_heads / tp, and rank i still holds queries i*G … i*G + G - 1. V is
    padded to a multiple of `tp`. Raises ValueError for a degree that does not divide the model.
    """
    config.check_tp(tp)
    kv_heads = config.kv_heads_at(tp)
    queries = config.num_heads // kv_heads
    return {
        "L": config.num_layers,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": kv_heads,
        "G": queries,
        "X": queries + 2,
        "K": config.head_dim,
        "A": config.num_heads * config.head_dim,
        "V": config.padded_vocab_size(tp),
        "2": 2,
    }


def weight_names(config: ModelConfig) -> tuple[str, ...]:
    """Fields of `DecoderWeights` that this model has, in their order."""
    present = {*_ALWAYS}
    if config.attention_bias:
        present.add("bqkv_LNXK")
    if config.qk_norm:
        present.update(("q_norm_LK", "k_norm_LK"))
    if not config.tie_word_embeddings:
        present.add("lm_head_VD")
    if config.quantization is not None:
        present.update(SCALES.values())
    return tuple(name for name in DecoderWeights._fields if name in present)


def weight_shapes(config: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Field of `DecoderWeights` -> its shape over all of `tp` ranks, for the fields that the model has."""
    sizes = axis_sizes(config, tp)
    return {name: tuple(sizes[axis] for axis in axes_of(name)) for name in weight_names(config)}


def layer_name(name: str) -> str:
    """Name of one layer of a stacked field: "w_down_FD" of "w_down_LFD"."""
    before, _, axes = name.rpartition("_")
    return f"{before}_{axes.removeprefix('L')}"


def unquantised(config: ModelConfig) -> ModelConfig:
    """The same model before its matrices become codes."""
    return replace(config, quantization=None)
