"""The shape of Llama-3.1-8B, without the scaling of its rotary embedding."""

from albireo_jax.core.model_config import ModelConfig

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
