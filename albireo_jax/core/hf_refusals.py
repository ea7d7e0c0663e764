"""Keys of a config.json that ask for a computation that these models do not do: refused by key and value.

A key that is not named here, in `hf_config` or in `hf_rope` is taken to change no result (training,
generation, bookkeeping). `pretraining_tp` is one: it cuts the same products into slices.
"""

import math

from albireo_jax.core.errors import ModelError
from albireo_jax.core.json_fields import Json, truth

_MUST_BE_FALSE = (
    *("mlp_bias", "use_mrope", "is_encoder_decoder", "add_cross_attention", "alibi", "use_alibi"),
    *("rope_interleaved", "rope_interleave", "parallel_attn", "use_parallel_residual", "attn_output_gate"),
)
_BIASES = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")
_QK_NORMS = ("qk_norm", "use_qk_norm", "qk_layernorm")
_MUST_BE_ONE = (
    *("residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale", "logit_multiplier"),
    *("scale_emb", "embedding_scale", "attention_output_multiplier", "lm_head_multiplier"),
)
_MUST_BE_NOTHING = (
    *("attn_logit_softcapping", "final_logit_softcapping", "attn_logit_cap", "clip_qkv", "sinks"),
    *("rope_local_base_freq", "local_rope_theta", "global_rope_theta", "rope_ratio", "scale_depth"),
    *("num_experts", "num_local_experts", "n_routed_experts", "mrope_section", "attention_chunk_size"),
)
"""Null, false and 0 ask for nothing."""

_POSITIONS = ("rope", "rotary", "absolute")
"""`position_embedding_type` of models that rotate; transformers writes its default "absolute" anywhere."""


def refuse_unsupported(config: Json, architecture: str, *, head_dim: int) -> None:
    """Raise ModelError for a key whose value asks for something that would be ignored."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise ModelError(
                f"config.json: {key} {config[key]!r} is not supported; load float weights, which can be "
                f"quantised to int8 or fp8 as they are loaded, or a GGUF file"
            )
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) not in (None, "silu", "swish"):
            raise ModelError(f"config.json: {key} {config[key]!r} is not supported, only 'silu' is")
    for key in _BIASES:
        if architecture != "Qwen2ForCausalLM" and truth(config, key):
            raise ModelError(f"config.json: {key} true is not supported for {architecture}")
    for key in _QK_NORMS:
        if architecture != "Qwen3ForCausalLM" and truth(config, key):
            raise ModelError(f"config.json: {key} true is not supported for {architecture}")
    for key in _MUST_BE_FALSE:
        if truth(config, key):
            raise ModelError(f"config.json: {key} true is not supported")
    for key in _MUST_BE_ONE:
        if config.get(key) not in (None, 1):
            raise ModelError(f"config.json: {key} {config[key]!r} is not supported, only 1 is")
    for key in _MUST_BE_NOTHING:
        if config.get(key) not in (None, False, 0, 0.0, []):
            raise ModelError(f"config.json: {key} {config[key]!r:.200} is not supported")
    _refuse_other_shapes(config, head_dim)


def _refuse_other_shapes(config: Json, head_dim: int) -> None:
    """Head widths and scales other than those that follow from `head_dim`, and layers without rotations."""
    for key in ("v_head_dim", "qk_head_dim", "kv_channels", "query_pre_attn_scalar"):
        if config.get(key) not in (None, head_dim):
            raise ModelError(f"config.json: {key} {config[key]!r} is not supported, only {head_dim} is")
    for key in ("attention_multiplier", "softmax_scale"):
        scale = config.get(key)
        if scale is not None and not _is_near(scale, head_dim**-0.5):
            raise ModelError(f"config.json: {key} {scale!r} is not supported, only {head_dim**-0.5} is")
    layers = config.get("no_rope_layers")
    if isinstance(layers, list) and not all(layers):
        raise ModelError(f"config.json: no_rope_layers {layers!r:.200} is not supported")
    if config.get("position_embedding_type") not in (None, *_POSITIONS):
        raise ModelError(
            f"config.json: position_embedding_type {config['position_embedding_type']!r} is not supported"
        )


def _is_near(value: object, expected: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isclose(value, expected, rel_tol=1e-6)
