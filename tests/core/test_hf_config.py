"""Hugging Face configurations: real ones parse or are refused by name, broken ones name the key."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.core.architectures import ARCHITECTURES, BY_MODEL_TYPE
from albireo_jax.core.errors import ModelError, UnknownArchitectureError
from albireo_jax.core.hf_config import (
    model_config_from_hf,
    model_config_to_hf,
    read_hf_config,
)
from albireo_jax.core.model_config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

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
        known = named in ARCHITECTURES or named in BY_MODEL_TYPE
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


def test_yarn_takes_what_it_is_not_told_from_the_paper() -> None:
    plain = {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    scaling = YarnRopeScaling(factor=4.0, original_max_position=128, attention_factor=1 + 0.1 * math.log(4))
    config = model_config_from_hf(plain)
    assert (config.rope_scaling, config.max_position) == (scaling, 512)
    qwen = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = model_config_from_hf({**LLAMA, "rope_parameters": qwen})
    assert config.rope_scaling == dataclasses.replace(scaling, original_max_position=64)
    assert config.max_position == 256
    told = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": None}
    assert model_config_from_hf({**LLAMA, "rope_parameters": {**qwen, **told}}).rope_scaling == (
        YarnRopeScaling(
            factor=4.0,
            original_max_position=64,
            attention_factor=1.5,
            beta_fast=16.0,
            beta_slow=2.0,
            truncates=False,
        )
    )
    deepseek = {"mscale": 1.0, "mscale_all_dim": 0.5}
    scaled = model_config_from_hf({**LLAMA, "rope_parameters": {**qwen, **deepseek}}).rope_scaling
    assert isinstance(scaled, YarnRopeScaling)
    assert scaled.attention_factor == pytest.approx((1 + 0.1 * math.log(4)) / (1 + 0.05 * math.log(4)))


@pytest.mark.parametrize(
    "extra",
    [
        {"pretraining_tp": 2, "torch_dtype": "float16", "use_cache": True, "attention_dropout": 0.1},
        {"attn_logit_softcapping": None, "num_experts": 0, "residual_multiplier": 1.0, "hidden_act": "swish"},
        {"attention_multiplier": 0.25, "query_pre_attn_scalar": 16, "partial_rotary_factor": 1.0},
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 64}},
        {"rope_scaling": None, "rope_parameters": None, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 8, "use_sliding_window": False},
    ],
)
def test_keys_that_ask_for_nothing_change_nothing(extra: dict[str, object]) -> None:
    assert model_config_from_hf({**LLAMA, **extra}) == model_config_from_hf(LLAMA)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_window_holds_in_every_layer_of_llama_and_mistral(architecture: str) -> None:
    config = {**LLAMA, "architectures": [architecture], "sliding_window": 32}
    assert model_config_from_hf(config).sliding_window == 32
    assert model_config_from_hf({**config, "layer_types": ["full_attention"] * 2}).sliding_window is None
    with pytest.raises(ModelError, match=r"full_attention, sliding_attention"):
        model_config_from_hf({**config, "layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearRopeScaling(factor=2.0),
        Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
        YarnRopeScaling(factor=2.0, original_max_position=64, attention_factor=1.2, truncates=False),
    ],
)
def test_a_configuration_survives_being_written(scaling: RopeScaling | None) -> None:
    config = dataclasses.replace(model_config_from_hf(LLAMA), rope_scaling=scaling, rope_theta=5e5)
    assert model_config_from_hf(model_config_to_hf(config)) == config


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
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1]}}, "rope_type 'longrope' is not"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type 3 is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 is not known for rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 8}}, "beta_fast 8 is not known"),
        ({"rope_parameters": {"rope_type": "default", "nope": [0]}}, r"nope \[0\] is not known"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "contradict each other"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000.0, but 500000.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters .* and rope_scaling .* contradict each other",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"kind of layer \(full_attention\)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has no factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "above 1 for yarn, got 1.0",
        ),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq 10000.0 is not supported"),
        ({"qkv_bias": True}, "qkv_bias true is not supported for LlamaForCausalLM"),
        ({"use_qk_norm": True}, "use_qk_norm true is not supported for LlamaForCausalLM"),
        ({"attention_multiplier": 0.5}, "attention_multiplier 0.5 is not supported, only 0.25 is"),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22 is not supported, only 1 is"),
        ({"embedding_multiplier": 12}, "embedding_multiplier 12 is not supported"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0 is not supported"),
        ({"logit_scale": 0.0625}, "logit_scale 0.0625 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256 is not supported, only 16 is"),
        ({"num_local_experts": 8}, "num_local_experts 8 is not supported"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\] is not supported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ({"compression_config": {"format": "pack"}}, "compression_config .* is not supported; load float"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 2 kinds"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "full_attention, linear_attention"),
        ({"layer_types": ["chunked_attention"] * 2}, "different attention .chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "but sliding_window is None"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": False},
            "use_sliding_window False",
        ),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
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
