"""Hugging Face configurations: real ones parse or are refused by name, broken ones name the key."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.core.config import LinearRopeScaling, Llama3RopeScaling
from albireo_jax.core.errors import ModelError, UnknownArchitectureError
from albireo_jax.core.hf_config import ARCHITECTURES, model_config_from_hf, read_hf_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_every_real_config_parses_to_its_shapes_or_is_refused_by_name(data_dir: Path) -> None:
    supported = 0
    for path in sorted((data_dir / "configs").glob("*.json")):
        raw = json.loads(path.read_text())
        named = (raw.get("architectures") or [raw["model_type"]])[0]
        known = named in ARCHITECTURES or named in ARCHITECTURES.values()
        if not known:
            with pytest.raises(
                UnknownArchitectureError, match=rf"{named}.*LlamaForCausalLM.*Qwen3ForCausalLM"
            ):
                model_config_from_hf(raw)
        elif "quantization_config" in raw:
            with pytest.raises(ModelError, match=r"quantization_config.*fp8"):
                model_config_from_hf(raw)
        else:
            config = model_config_from_hf(raw)
            supported += 1
            assert config.num_layers == raw["num_hidden_layers"], path.name
            assert config.hidden_size == raw["hidden_size"], path.name
            assert config.num_heads == raw["num_attention_heads"], path.name
            assert config.num_kv_heads == raw["num_key_value_heads"], path.name
            assert config.head_dim == 128, path.name  # of every one of these models
            assert 1 in config.tp_degrees()
    assert supported == 19


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen--Qwen2.5-14B", {"rope_theta": 1e6, "attention_bias": True, "sliding_window": None}),
        ("Qwen--Qwen3-4B", {"rope_theta": 1e6, "qk_norm": True, "tie_word_embeddings": True}),
        ("mistralai--Mistral-7B-v0.1", {"rope_theta": 1e4, "sliding_window": 4096}),
        ("nvidia--Llama-3.1-70B-Instruct-FP8", {"eos_token_ids": (128001, 128008, 128009)}),
        ("Qwen--Qwen2.5-1.5B", {"sliding_window": None, "eos_token_ids": (151643,)}),
    ],
)
def test_real_configs_keep_their_peculiarities(
    data_dir: Path, name: str, expected: dict[str, object]
) -> None:
    config = model_config_from_hf(json.loads((data_dir / "configs" / f"{name}_config.json").read_text()))
    assert dataclasses.asdict(config).items() >= expected.items()


def test_missing_optional_keys_mean_what_transformers_takes_them_to_mean() -> None:
    config = model_config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 1e4)
    assert (config.rope_scaling, config.sliding_window, config.tie_word_embeddings) == (None, None, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    qwen3 = model_config_from_hf({**LLAMA, "architectures": None, "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm) == (128, True)


def test_rope_reads_alike_from_old_and_new_keys() -> None:
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA31_ROPE, "type": "llama3"}}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **LLAMA31_ROPE}}
    assert model_config_from_hf(old) == model_config_from_hf(older) == model_config_from_hf(new)
    assert model_config_from_hf(new).rope_theta == 5e5
    assert model_config_from_hf(new).rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64
    )
    linear = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert model_config_from_hf(linear).rope_scaling == LinearRopeScaling(factor=2.0)


def test_eos_ids_come_from_both_files_each_once() -> None:
    one = model_config_from_hf({**LLAMA, "eos_token_id": 2}, {"eos_token_id": [2, 7]})
    many = model_config_from_hf({**LLAMA, "eos_token_id": [9, 2]}, {"eos_token_id": 2})
    assert (one.eos_token_ids, many.eos_token_ids) == ((2, 7), (9, 2))


@pytest.mark.parametrize(
    ("extra", "window"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 32),
        ({"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_qwen_slides_in_all_layers_or_in_none(extra: dict[str, object], window: int | None) -> None:
    assert model_config_from_hf({**QWEN2, **extra}).sliding_window == window


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "has no low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a positive number, got 0"),
        ({"rope_parameters": {"full_attention": {}, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": 3}, "rope_scaling must be an object, got 3"),
        ({"hidden_size": "64"}, "hidden_size must be an integer, got '64'"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": 62}, "hidden_size 62 is not a multiple"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_config_from_hf({**LLAMA, **change})


def test_a_mix_of_sliding_and_full_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"full_attention, sliding_attention.*max_window_layers 1 of 2"):
        model_config_from_hf({**QWEN2, "use_sliding_window": True, "max_window_layers": 1})


def test_a_folder_is_read_with_its_generation_config_and_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 1}))
    assert read_hf_config(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert read_hf_config(tmp_path).eos_token_ids == (1, 5)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json must hold a JSON object"):
        read_hf_config(tmp_path)
