"""A Hugging Face `config.json` as a `ModelConfig`; what cannot be run is refused by key and value."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from albireo_jax.core.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig, RopeScaling
from albireo_jax.core.errors import ModelError, UnknownArchitectureError

Json: TypeAlias = Mapping[str, Any]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures that this project runs, as Hugging Face names them, and their `model_type`."""

_QWEN3_HEAD_DIM = 128  # what transformers assumes where the key is missing
_DEFAULT_ROPE_THETA = 10000.0
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_hf_config(folder: Path) -> ModelConfig:
    """Configuration of the model in `folder`: its config.json, and the end-of-sequence ids of
    its generation_config.json if there is one.

    Raises ModelError naming the file, key or value that is broken or not supported, and
    UnknownArchitectureError with the architectures that are.
    """
    generation = folder / "generation_config.json"
    return model_config_from_hf(
        _read_json(folder / "config.json"), _read_json(generation) if generation.is_file() else {}
    )


def model_config_from_hf(config: Json, generation: Json | None = None) -> ModelConfig:
    """`ModelConfig` of the contents of config.json and, for more end-of-sequence ids, generation_config.json.

    Raises like `read_hf_config`.
    """
    architecture = _architecture(config)
    _refuse_unsupported(config, architecture)
    num_heads = _int(config, "num_attention_heads")
    rope = _rope(config)
    try:
        return ModelConfig(
            architecture=architecture,
            num_layers=_int(config, "num_hidden_layers"),
            hidden_size=_int(config, "hidden_size"),
            intermediate_size=_int(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=_int(config, "num_key_value_heads", num_heads),
            head_dim=_head_dim(config, architecture),
            vocab_size=_int(config, "vocab_size"),
            max_position=_int(config, "max_position_embeddings"),
            rms_norm_eps=_float(config, "rms_norm_eps"),
            rope_theta=_float(rope, "rope_theta", _DEFAULT_ROPE_THETA),
            rope_scaling=_rope_scaling(rope),
            sliding_window=_sliding_window(config, architecture),
            tie_word_embeddings=_bool(config, "tie_word_embeddings"),
            attention_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
            eos_token_ids=_eos_token_ids(config, generation or {}),
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"config.json describes no model: {error}") from error


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Contents of a config.json, as transformers 5 writes it, that reads back as `config`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    match config.rope_scaling:
        case LinearRopeScaling(factor=factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case Llama3RopeScaling() as scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
        case None:
            pass
    slides = config.sliding_window is not None
    return {
        "architectures": [config.architecture],
        "model_type": ARCHITECTURES[config.architecture],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "use_sliding_window": slides,
        "max_window_layers": 0 if slides else config.num_layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def _read_json(path: Path) -> Json:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return contents


def _architecture(config: Json) -> str:
    """From `architectures`, or from `model_type` in a file saved by a bare configuration."""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise ModelError(f"config.json: architectures must be a list, got {names!r}")
    if names:
        name = str(names[0])
    else:
        by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
        model_type = str(config.get("model_type"))
        name = by_type.get(model_type, model_type)
    if name not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"architecture {name!r} is not one of those known: {sorted(ARCHITECTURES)}"
        )
    return name


def _refuse_unsupported(config: Json, architecture: str) -> None:
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"config.json: quantization_config {config['quantization_config']!r} is not supported; "
            f"load float weights, which can be quantised to int8 or fp8 as they are loaded, or a GGUF file"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"config.json: hidden_act {activation!r} is not supported, only 'silu' is")
    if _bool(config, "attention_bias") and architecture != "Qwen2ForCausalLM":
        raise ModelError(f"config.json: attention_bias true is not supported for {architecture}")
    for key in ("mlp_bias", "use_mrope"):
        if _bool(config, key):
            raise ModelError(f"config.json: {key} true is not supported")


def _head_dim(config: Json, architecture: str) -> int:
    if config.get("head_dim") is not None:
        return _int(config, "head_dim")
    if architecture == "Qwen3ForCausalLM":
        return _QWEN3_HEAD_DIM
    hidden_size, num_heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    if num_heads < 1 or hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} "
            f"and there is no head_dim"
        )
    return hidden_size // num_heads


def _rope(config: Json) -> Json:
    """Everything on rotary embeddings as transformers 5 writes it, from the older keys if need be."""
    new = config.get("rope_parameters")
    rope = new if new is not None else config.get("rope_scaling")
    if rope is None:
        rope = {}
    if not isinstance(rope, dict):
        raise ModelError(f"config.json: rope_parameters or rope_scaling must be an object, got {rope!r}")
    return {"rope_theta": config.get("rope_theta"), **rope}


def _rope_scaling(rope: Json) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if _float(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} is not supported"
        )
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearRopeScaling(factor=_float(rope, "factor"))
    if rope_type == "llama3":
        return Llama3RopeScaling(
            factor=_float(rope, "factor"),
            low_freq_factor=_float(rope, "low_freq_factor"),
            high_freq_factor=_float(rope, "high_freq_factor"),
            original_max_position=_int(rope, "original_max_position_embeddings"),
        )
    raise ModelError(
        f"config.json: rope_type {rope_type!r} is not supported; those are 'default', 'linear', 'llama3'"
    )


def _sliding_window(config: Json, architecture: str) -> int | None:
    """The window, if all layers slide; none, if none does. A mix of both is refused."""
    if architecture == "LlamaForCausalLM" or config.get("sliding_window") is None:
        return None
    window = _int(config, "sliding_window")
    if architecture == "MistralForCausalLM":
        return window
    if not _bool(config, "use_sliding_window"):
        return None
    num_layers = _int(config, "num_hidden_layers")
    first = _int(config, "max_window_layers", num_layers)
    by_default = [_SLIDING if layer >= first else _FULL for layer in range(num_layers)]
    layer_types = config.get("layer_types") or by_default
    if not isinstance(layer_types, list):
        raise ModelError(f"config.json: layer_types must be a list, got {layer_types!r}")
    kinds = {str(kind) for kind in layer_types}
    if kinds == {_FULL}:
        return None
    if kinds == {_SLIDING}:
        return window
    raise ModelError(
        f"config.json: layers of different attention ({', '.join(sorted(kinds))}) are not supported; "
        f"use_sliding_window is true, max_window_layers {first} of {num_layers} layers"
    )


def _eos_token_ids(config: Json, generation: Json) -> tuple[int, ...]:
    """Each id once, the configuration's first."""
    ids = (*_token_ids(config, "eos_token_id"), *_token_ids(generation, "eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _token_ids(config: Json, key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ModelError(f"config.json: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _int(config: Json, key: str, default: int | None = None) -> int:
    value = _required(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _float(config: Json, key: str, default: float | None = None) -> float:
    value = _required(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def _bool(config: Json, key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ModelError(f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)


def _required(config: Json, key: str, default: object) -> object:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json has no {key}")
    return value
