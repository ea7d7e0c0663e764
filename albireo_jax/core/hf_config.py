"""A Hugging Face `config.json` as a `ModelConfig`; what cannot be run is refused by key and value."""

from pathlib import Path
from typing import Any

from albireo_jax.core.architectures import ARCHITECTURES, BY_MODEL_TYPE
from albireo_jax.core.errors import ModelError, UnknownArchitectureError
from albireo_jax.core.hf_refusals import refuse_unsupported
from albireo_jax.core.hf_rope import read_rope, rope_to_hf
from albireo_jax.core.json_fields import Json, integer, positive, read_json, truth
from albireo_jax.core.model_config import ModelConfig

_QWEN3_HEAD_DIM = 128  # what transformers assumes where the key is missing
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_hf_config(folder: Path) -> ModelConfig:
    """Configuration of the model in `folder`: its config.json, and the end-of-sequence ids of
    its generation_config.json if there is one.

    Raises ModelError naming the file, key or value that is broken or not supported, and
    UnknownArchitectureError with the architectures that are.
    """
    generation = folder / "generation_config.json"
    return model_config_from_hf(
        _read_object(folder / "config.json"), _read_object(generation) if generation.is_file() else {}
    )


def model_config_from_hf(config: Json, generation: Json | None = None) -> ModelConfig:
    """`ModelConfig` of the contents of config.json and, for more end-of-sequence ids, generation_config.json.

    Raises like `read_hf_config`.
    """
    architecture = _architecture(config)
    refuse_unsupported(config, architecture, head_dim=_head_dim(config, architecture))
    num_heads = integer(config, "num_attention_heads")
    rope = read_rope(config)
    try:
        return ModelConfig(
            architecture=architecture,
            num_layers=integer(config, "num_hidden_layers"),
            hidden_size=integer(config, "hidden_size"),
            intermediate_size=integer(config, "intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", num_heads),
            head_dim=_head_dim(config, architecture),
            vocab_size=integer(config, "vocab_size"),
            max_position=rope.max_position,
            rms_norm_eps=positive(config, "rms_norm_eps"),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            sliding_window=_sliding_window(config, architecture),
            tie_word_embeddings=truth(config, "tie_word_embeddings"),
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
    slides = config.sliding_window is not None
    return {
        "architectures": [config.architecture],
        "model_type": ARCHITECTURES[config.architecture].model_type,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope_to_hf(config),
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "use_sliding_window": slides,
        "max_window_layers": 0 if slides else config.num_layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }


def _read_object(path: Path) -> Json:
    contents = read_json(path)
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
        model_type = str(config.get("model_type"))
        name = BY_MODEL_TYPE.get(model_type, model_type)
    if name not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"architecture {name!r} is not one of those known: {sorted(ARCHITECTURES)}"
        )
    return name


def _head_dim(config: Json, architecture: str) -> int:
    if config.get("head_dim") is not None:
        return integer(config, "head_dim")
    if architecture == "Qwen3ForCausalLM":
        return _QWEN3_HEAD_DIM
    hidden_size, num_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if num_heads < 1 or hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} "
            f"and there is no head_dim"
        )
    return hidden_size // num_heads


def _sliding_window(config: Json, architecture: str) -> int | None:
    """The window, if all layers slide; none, if none does. A mix of both is refused, and a contradiction."""
    kinds = _layer_kinds(config, architecture)
    if kinds == {_FULL}:
        return None
    if kinds != {_SLIDING}:
        raise ModelError(
            f"config.json: layers of different attention ({', '.join(sorted(kinds))}) are not supported; "
            f"use_sliding_window is {config.get('use_sliding_window')}, max_window_layers "
            f"{config.get('max_window_layers')} of {config.get('num_hidden_layers')} layers"
        )
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        raise ModelError(
            f"config.json: layer_types are {_SLIDING!r}, but sliding_window is "
            f"{config.get('sliding_window')} and use_sliding_window {config.get('use_sliding_window')}"
        )
    window = integer(config, "sliding_window")
    if window < 1:
        raise ModelError(f"config.json: sliding_window must be at least 1, got {window}")
    return window


def _layer_kinds(config: Json, architecture: str) -> set[str]:
    """Kinds of attention that the layers have, from `layer_types` or from the keys that stand for it."""
    num_layers = integer(config, "num_hidden_layers")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers or not num_layers:
            raise ModelError(
                f"config.json: layer_types must be a list of {num_layers} kinds, got {layer_types!r:.200}"
            )
        return {str(kind) for kind in layer_types}
    uses = truth(config, "use_sliding_window")
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return {_FULL}
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        return {_SLIDING}
    first = integer(config, "max_window_layers", num_layers)
    by_default = {_SLIDING if uses and layer >= first else _FULL for layer in range(num_layers)}
    return by_default or {_FULL}


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
