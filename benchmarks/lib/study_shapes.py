"""Shapes of the random Llamas that studies on a CPU run, their heads enough for eight ranks."""

from dataclasses import replace

from albireo_jax.core.config import ModelConfig

MID_LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=512,
    intermediate_size=1536,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=16_384,
    max_position=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)
"""About 30 million parameters, so that a step takes milliseconds."""

TINY_LLAMA = replace(
    MID_LLAMA, num_layers=1, hidden_size=64, intermediate_size=128, head_dim=8, vocab_size=1000
)
"""As little as shows that a study runs."""
