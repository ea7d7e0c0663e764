"""A GGUF file of random weights in the shape of a model, for llama.cpp.

Its vocabulary has a made-up piece for every id, so that ids can be sent and counted, but no text.
"""

from pathlib import Path

import gguf
import numpy as np

from albireo_jax.core.config import Dtype
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.models.llama import GGUF_NAMES
from albireo_jax.nn.weights import expected_tensors

_DRAWN = 2**22
_SCALE = 0.02
_NAMES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_STORED = {
    Dtype.FLOAT32: gguf.GGMLQuantizationType.F32,
    Dtype.BFLOAT16: gguf.GGMLQuantizationType.BF16,
}


def write_random_gguf(config: ModelConfig, path: Path, *, dtype: Dtype) -> None:
    """Write a model of this shape to `path`, its matrices in `dtype`, its vectors in float32.

    Raises ValueError for an architecture, a dtype or a scaled rotary embedding that is not written here.
    """
    if config.architecture not in _NAMES or config.rope_scaling is not None or dtype not in _STORED:
        raise ValueError(
            f"no GGUF file of {config.architecture} with {config.rope_scaling} in {dtype}; "
            f"known are {list(_NAMES)} without scaling in {list(_STORED)}"
        )
    writer = gguf.GGUFWriter(path, _NAMES[config.architecture])
    _add_shape(writer, config)
    _add_vocabulary(writer, config.vocab_size)
    tensors = expected_tensors(config, GGUF_NAMES)
    for name, shape in tensors.items():
        kind = _STORED[dtype] if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        _, item_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), item_bytes * int(np.prod(shape)), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    drawn = np.random.default_rng(0).standard_normal(_DRAWN, np.float32) * np.float32(_SCALE)
    stored = gguf.quantize(drawn, _STORED[dtype]).view(np.uint8)
    for name, shape in tensors.items():
        if len(shape) == 2:  # the same numbers again and again: drawing billions would take minutes
            writer.write_tensor_data(np.resize(stored, stored.size // _DRAWN * int(np.prod(shape))))
        else:
            writer.write_tensor_data(np.full(shape, not name.endswith("bias"), np.float32))
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{token_id}>" for token_id in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["< 0"])  # text is never encoded, but the list may not be empty
