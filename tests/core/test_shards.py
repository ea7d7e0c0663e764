"""The model of one rank."""

from dataclasses import replace

import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.shards import shard_shaped

MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM",
    num_layers=3,
    hidden_size=64,
    intermediate_size=160,
    num_heads=16,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=1003,
    max_position=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    attention_bias=True,
)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_it_takes_the_memory_of_one_rank(tp: int, tied: bool) -> None:
    model = replace(MODEL, tie_word_embeddings=tied)
    shard = shard_shaped(model, tp)
    assert weight_bytes(shard, tp=1, dtype=Dtype.BFLOAT16) == weight_bytes(model, tp=tp, dtype=Dtype.BFLOAT16)
    of_shard = page_bytes(shard, tp=1, page_size=16, dtype=Dtype.BFLOAT16)
    assert of_shard == page_bytes(model, tp=tp, page_size=16, dtype=Dtype.BFLOAT16)


def test_a_degree_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="tp 8 does not divide this model"):
        shard_shaped(replace(MODEL, intermediate_size=172), 8)
