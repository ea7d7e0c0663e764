"""The model that one rank of a tensor-parallel group has, as a model of its own."""

from dataclasses import replace

from albireo_jax.core.model_config import ModelConfig


def shard_shaped(model: ModelConfig, tp: int) -> ModelConfig:
    """A model whose forward pass on one device is that of one of `tp` ranks, but for the collectives.

    It has the rank's heads, feed-forward width and vocabulary, and the whole hidden size. Raises ValueError
    if `tp` ranks cannot share the model.
    """
    model.check_tp(tp)
    return replace(
        model,
        num_heads=model.num_heads // tp,
        num_kv_heads=model.kv_heads_at(tp) // tp,
        intermediate_size=model.intermediate_size // tp,
        vocab_size=model.padded_vocab_size(tp) // tp,
    )
