"""GGUF metadata and tensors: what is read, and what is refused by key or tensor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from albireo_jax.core.config import LinearRopeScaling, Llama3RopeScaling
from albireo_jax.core.errors import ModelError, UnknownArchitectureError, WeightError
from albireo_jax.nn.gguf import GgufSource, model_config_from_gguf
from albireo_jax.nn.layers import rope_frequencies

Write = Callable[..., Path]
META: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a GGUF file; some keys of META changed, left out (None), or in full (after a dot)."""

    def write(changes: dict[str, Any] | None = None, *, arch: str = "llama", **tensors: np.ndarray) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in {**META, **(changes or {})}.items():
            if value is not None:
                _add(writer, key[1:] if key.startswith(".") else f"{arch}.{key}", value)
        for name, tensor in {"token_embd.weight": np.zeros((100, 32), np.float32), **tensors}.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def read(path: Path) -> Any:
    return model_config_from_gguf(GgufSource(path))


def test_missing_optional_keys_take_their_defaults(write: Write) -> None:
    config = read(write())
    assert (config.architecture, config.num_kv_heads, config.head_dim) == ("LlamaForCausalLM", 4, 8)
    assert (config.vocab_size, config.rope_theta, config.sliding_window) == (100, 1e4, None)
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_ids) == (True, None, ())


def test_keys_and_tensors_decide_the_configuration(write: Write) -> None:
    changes = {
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 9,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
        ".tokenizer.ggml.bos_token_id": 7,
        ".tokenizer.ggml.eos_token_id": 8,
        ".tokenizer.ggml.eot_token_id": 9,
        ".tokenizer.ggml.eom_token_id": 8,
    }
    head = {"output.weight": np.zeros((100, 32), np.float32)}
    config = read(write(changes, arch="qwen2", **head))
    assert (config.architecture, config.attention_bias, config.qk_norm) == ("Qwen2ForCausalLM", True, False)
    assert (config.num_kv_heads, config.head_dim, config.sliding_window) == (2, 16, 9)
    assert (config.rope_theta, config.rope_scaling) == (1e6, LinearRopeScaling(factor=4.0))
    assert (config.bos_token_id, config.eos_token_ids) == (7, (8, 9))
    assert not config.tie_word_embeddings
    assert read(write(arch="qwen3")).qk_norm


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 16)])
def test_llama3_scaling_is_recovered_from_its_divisors(write: Write, factor: float, original: int) -> None:
    scaling = Llama3RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=original
    )
    divisors = rope_frequencies(64, 5e5, None) / rope_frequencies(64, 5e5, scaling)
    keys = {"attention.key_length": 64, "attention.value_length": 64, "rope.freq_base": 5e5}
    config = read(write(keys, **{"rope_freqs.weight": divisors}))
    assert config.rope_scaling.factor == pytest.approx(factor)
    assert config.rope_scaling.original_max_position == pytest.approx(original, rel=1e-2)
    np.testing.assert_allclose(
        rope_frequencies(64, 5e5, config.rope_scaling), rope_frequencies(64, 5e5, scaling), rtol=1e-3
    )
    assert read(write(**{"rope_freqs.weight": np.ones(4, np.float32)})).rope_scaling is None
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not a Llama 3\.1 rope scaling"):
        read(write(keys, **{"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not"):
        read(write(keys, **{"rope_freqs.weight": np.ones(5, np.float32)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"embedding_length": "wide"}, r"llama\.embedding_length must be an integer, got 'wide'"),
        ({"feed_forward_length": [48, 64]}, r"feed_forward_length must be an integer, got \[48, 64\]"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, r"rms_epsilon must be a positive number"),
        ({"attention.head_count": 0}, r"num_heads must be at least 1"),
        ({"attention.head_count_kv": 3}, r"num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"attention.value_length": 9}, r"attention\.value_length 9 is not supported, only 8 is"),
        ({"rope.dimension_count": 4}, r"rope\.dimension_count 4 is not supported, only 8 is"),
        ({"expert_count": 8}, r"expert_count 8 is not supported, only 0 is"),
        ({"rope.scaling.type": "yarn"}, r"rope\.scaling\.type 'yarn' is not supported"),
        ({".tokenizer.ggml.eos_token_id": "</s>"}, r"eos_token_id must be a token id, got '</s>'"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key_and_value(
    write: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=rf"model\.gguf.*{message}"):
        read(write(changes))


def test_unknown_architectures_are_refused_with_those_known(write: Write) -> None:
    with pytest.raises(UnknownArchitectureError, match=r"'gemma3' .*\['llama', 'qwen2', 'qwen3'\]"):
        read(write(arch="gemma3"))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_any_part_of_a_tensor_is_that_part_of_the_whole(tmp_path: Path, kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    stored = gguf.quants.quantize(values, quantisation)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "x.gguf")
    whole = gguf.quants.dequantize(stored, quantisation)
    assert source.tensors["x"].shape == (6, 96)
    np.testing.assert_array_equal(source.read("x"), whole)
    np.testing.assert_array_equal(source.read("x", slice(2, 5)), whole[2:5])
    for columns in (slice(0, 32), slice(5, 7), slice(31, 65), slice(90, 96)):
        np.testing.assert_array_equal(source.read("x", slice(1, 6), columns), whole[1:6, columns])


def test_a_broken_file_is_named(write: Write) -> None:
    path = write()
    good = path.read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(
        WeightError, match=r"model\.gguf is truncated: tensor token_embd\.weight ends at byte"
    ):
        GgufSource(path)
    for broken in (good[:100], good[:3], b"", b"GGML" + good[4:], good[:4] + b"\x09" + good[5:]):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"model\.gguf is not a readable GGUF file"):
            GgufSource(path)


def test_a_file_without_an_embedding_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightError, match=r"missing tensor token_embd\.weight"):
        read(tmp_path / "x.gguf")
