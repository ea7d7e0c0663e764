"""Tiny models of every kind for the tests of the array functions."""

import pytest

from albireo_jax.core.config import Llama3RopeScaling, ModelConfig

LLAMA = {
    "architecture": "LlamaForCausalLM",
    "num_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


@pytest.fixture(params=["llama", "everything"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    if request.param == "llama":
        return ModelConfig(**LLAMA, tie_word_embeddings=True)
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
    )
    return ModelConfig(**LLAMA, attention_bias=True, qk_norm=True, rope_scaling=scaling, sliding_window=7)
