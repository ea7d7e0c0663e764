"""Tiny models for the tests of the array functions."""

import functools
from typing import Any

import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.core.model_config import Llama3RopeScaling, ModelConfig
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.random_weights import random_weights
from albireo_jax.nn.sharding import make_mesh

SHAPE: dict[str, Any] = {
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


@pytest.fixture
def llama() -> ModelConfig:
    """The plainest model, embeddings tied."""
    return ModelConfig(architecture="LlamaForCausalLM", **SHAPE, tie_word_embeddings=True)


@pytest.fixture
def everything() -> ModelConfig:
    """A model with every optional part; no real one has them all."""
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
    )
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        **SHAPE,
        attention_bias=True,
        qk_norm=True,
        rope_scaling=scaling,
        sliding_window=7,
    )


@functools.cache
def weights_of(config: ModelConfig) -> DecoderWeights:
    return random_weights(config, dtype=Dtype.FLOAT32, mesh=make_mesh(2), seed=1)


@pytest.fixture
def model(everything: ModelConfig) -> Decoder:
    """A random model with every part on two devices."""
    return Decoder(everything, weights_of(everything), make_mesh(2))
