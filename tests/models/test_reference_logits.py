"""Logits equal those of transformers, whole and sharded, in both loop forms, from safetensors and GGUF."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from safetensors.numpy import load_file

from albireo_jax.core.config import Dtype
from albireo_jax.core.hf_config import read_hf_config
from albireo_jax.core.model_config import Llama3RopeScaling, ModelConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.models.registry import load_model, model_config
from albireo_jax.nn.decoder import forward, head, logits, queries_keys_values, weight_specs
from albireo_jax.nn.layers import causal_attention
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import TP, make_mesh

Q8_0 = gguf.GGMLQuantizationType.Q8_0
TOLERANCE = 1e-4
REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A tiny checkpoint saved by transformers, and its float32 logits there for a text."""

    folder: Path
    config: ModelConfig
    tokens: NDArray[np.int32]
    logits: NDArray[np.float32]

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        files = sorted(self.folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(params=["llama2", "llama31", "qwen2", "qwen3", "mistral"])
def reference(request: pytest.FixtureRequest) -> Reference:
    return read_reference(request.param)


def read_reference(name: str) -> Reference:
    folder = REFERENCE / name
    with np.load(folder / "reference.npz") as arrays:
        tokens, logits = arrays["tokens"], arrays["logits"]
    return Reference(folder=folder, config=read_hf_config(folder), tokens=tokens, logits=logits)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a reference as a GGUF file, with matrices of a quantised kind where their rows allow."""

    def write(reference: Reference, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
        path = tmp_path / f"{reference.folder.name}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(
            path, gguf.MODEL_ARCH_NAMES[GGUF_ARCHITECTURES[reference.config.architecture]]
        )
        _add_metadata(writer, reference.config)
        _add_tensors(writer, reference, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def load(path: Path, tp: int = 1) -> Decoder:
    files = find_model(str(path))
    return load_model(files, config=model_config(files), dtype=Dtype.FLOAT32, mesh=make_mesh(tp))


def sharded_logits(model: Decoder, tokens: np.ndarray, *, unroll: bool) -> np.ndarray:
    """Logits by the functions that an engine uses, inside `shard_map`."""
    config, weights = model.config, model.weights()

    def local(weights, token_T):
        def attend(layer, projected, cache):
            q, k, v = queries_keys_values(projected)
            return causal_attention(q, k, v, sliding_window=config.sliding_window), cache

        position_T = jnp.arange(token_T.shape[0], dtype=jnp.int32)
        hidden_TD, _ = forward(
            config, weights, token_T, position_T=position_T, cache=(), attend=attend, axis=TP, unroll=unroll
        )
        return logits(config, head(weights), hidden_TD, axis=TP)

    specs = (weight_specs(weights), P())
    program = jax.shard_map(local, mesh=model.mesh, in_specs=specs, out_specs=P(None, TP))
    return np.asarray(jax.jit(program)(weights, jnp.asarray(tokens)))


def test_the_references_are_not_trivial(reference: Reference) -> None:
    assert reference.logits.std() > 0.5
    assert len(reference.tokens) > (reference.config.sliding_window or 0)


@pytest.mark.parametrize(("tp", "unroll"), [(1, False), (2, True), (4, False)])
def test_sharded_logits_equal_transformers(reference: Reference, tp: int, unroll: bool) -> None:
    out = sharded_logits(load(reference.folder, tp), reference.tokens, unroll=unroll)
    vocab = reference.config.vocab_size
    np.testing.assert_allclose(out[:, :vocab], reference.logits, rtol=0, atol=TOLERANCE)
    assert out.shape[1] == reference.config.padded_vocab_size(tp)
    assert np.all(np.isneginf(out[:, vocab:]))


def test_key_value_heads_are_replicated_beyond_their_number() -> None:
    reference = read_reference("qwen3")
    assert reference.config.num_kv_heads == 4
    out = sharded_logits(load(reference.folder, 8), reference.tokens, unroll=False)
    np.testing.assert_allclose(out[:, :101], reference.logits, rtol=0, atol=TOLERANCE)


def test_dense_call_of_a_gguf_file_equals_transformers(
    reference: Reference, write_gguf: Callable[..., Path]
) -> None:
    out = load(write_gguf(reference))(jnp.asarray(reference.tokens))
    assert out.shape == reference.logits.shape
    np.testing.assert_allclose(out, reference.logits, rtol=0, atol=TOLERANCE)


def test_gguf_and_safetensors_give_the_same_weights(
    reference: Reference, write_gguf: Callable[..., Path]
) -> None:
    folder, file = load(reference.folder, 2).weights(), load(write_gguf(reference), 2).weights()
    jax.tree.map(np.testing.assert_array_equal, folder, file)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama31", "qwen2"])
def test_quantised_tensors_are_expanded_slice_by_slice(
    name: str, tp: int, write_gguf: Callable[..., Path]
) -> None:
    """A rank's columns may begin inside a block of 32: at tp 2 and 4 those of qwen2's output matrix do."""
    reference = read_reference(name)
    expanded = {
        tensor: gguf.quants.dequantize(
            gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        )
        if array.ndim == 2 and array.shape[1] % 32 == 0
        else array
        for tensor, array in reference.tensors().items()
    }
    weights = load(write_gguf(reference, Q8_0), tp).weights()
    embed = np.asarray(weights.embed_VD)[: reference.config.vocab_size]
    np.testing.assert_array_equal(embed, expanded["model.embed_tokens.weight"])
    wo = np.asarray(weights.wo_LAD)[1]
    np.testing.assert_array_equal(wo, expanded["model.layers.1.self_attn.o_proj.weight"].T)
    down = np.asarray(weights.w_down_LFD)[1]
    np.testing.assert_array_equal(down, expanded["model.layers.1.mlp.down_proj.weight"].T)


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
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
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def _add_tensors(writer: gguf.GGUFWriter, reference: Reference, kind: gguf.GGMLQuantizationType) -> None:
    config = reference.config
    architecture = GGUF_ARCHITECTURES[config.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for hf_name, tensor in reference.tensors().items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        if architecture is gguf.MODEL_ARCH.LLAMA and ("q_proj" in hf_name or "k_proj" in hf_name):
            tensor = _pair_by_pair(tensor, tensor.shape[0] // config.head_dim)
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        if tensor.ndim == 2 and tensor.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    if isinstance(config.rope_scaling, Llama3RopeScaling):
        writer.add_tensor("rope_freqs.weight", rope_divisors(config, config.rope_scaling))


def _pair_by_pair(tensor: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of queries or keys in llama.cpp's order, as its conversion script permutes them."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def rope_divisors(config: ModelConfig, scaling: Llama3RopeScaling) -> NDArray[np.float32]:
    """What llama.cpp's conversion script keeps of Llama 3.1's scaling, wave by wave."""
    divisors: list[float] = []
    for pair in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (pair / config.head_dim)
        turns = scaling.original_max_position / wavelength
        if turns > scaling.high_freq_factor:
            divisors.append(1.0)
        elif turns < scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (turns - scaling.low_freq_factor) / span
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)
