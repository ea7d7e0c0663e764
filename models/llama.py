"""Llama 2, 3 and 3.1, and models of their make (SmolLM2, TinyLlama, ...)."""

from typing import ClassVar

from albireo_jax.nn.module import Decoder
from albireo_jax.nn.weights import TensorNames

HF_NAMES = TensorNames(
    embed="model.embed_tokens",
    final_norm="model.norm",
    lm_head="lm_head",
    attention_norm="model.layers.{layer}.input_layernorm",
    query="model.layers.{layer}.self_attn.q_proj",
    key="model.layers.{layer}.self_attn.k_proj",
    value="model.layers.{layer}.self_attn.v_proj",
    output="model.layers.{layer}.self_attn.o_proj",
    mlp_norm="model.layers.{layer}.post_attention_layernorm",
    gate="model.layers.{layer}.mlp.gate_proj",
    up="model.layers.{layer}.mlp.up_proj",
    down="model.layers.{layer}.mlp.down_proj",
    query_norm="model.layers.{layer}.self_attn.q_norm",
    key_norm="model.layers.{layer}.self_attn.k_norm",
    ignored=("rotary_emb.inv_freq",),
)
"""Names in a Hugging Face checkpoint; all decoders of this kind share them."""

GGUF_NAMES = TensorNames(
    embed="token_embd",
    final_norm="output_norm",
    lm_head="output",
    attention_norm="blk.{layer}.attn_norm",
    query="blk.{layer}.attn_q",
    key="blk.{layer}.attn_k",
    value="blk.{layer}.attn_v",
    output="blk.{layer}.attn_output",
    mlp_norm="blk.{layer}.ffn_norm",
    gate="blk.{layer}.ffn_gate",
    up="blk.{layer}.ffn_up",
    down="blk.{layer}.ffn_down",
    query_norm="blk.{layer}.attn_q_norm",
    key_norm="blk.{layer}.attn_k_norm",
    ignored=("rope_freqs.weight",),  # read as part of the configuration
    interleaved_rope=True,
)
"""Names in a GGUF file; only llama ones keep the rows of queries and keys pair by pair."""


class Llama(Decoder):
    """A decoder with rotary embeddings, grouped-query attention and a gated feed-forward."""

    hf_names: ClassVar[TensorNames] = HF_NAMES
    gguf_names: ClassVar[TensorNames] = GGUF_NAMES
