"""GGUF metadata and tensors: what is read, and what is refused by key or tensor."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from albireo_jax.core.errors import ModelError, UnknownArchitectureError, WeightError
from albireo_jax.core.model_config import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from albireo_jax.core.model_files import find_model
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


def test_yarn_and_linear_factors_are_read_as_llama_cpp_reads_them(write: Write) -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    scaling = YarnRopeScaling(
        factor=4.0, original_max_position=64, attention_factor=1 + 0.1 * math.log(4), truncates=True
    )
    assert read(write(keys)).rope_scaling == scaling
    more = {"rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 16.0}
    more |= {"rope.scaling.yarn_attn_factor": 0.5, "rope.scaling.finetuned": True}
    assert read(write(keys | more)).rope_scaling == dataclasses.replace(
        scaling, original_max_position=16, beta_fast=16.0, attention_factor=scaling.attention_factor / 2
    )
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        assert read(write({key: 2.0})).rope_scaling == LinearRopeScaling(factor=2.0)
        assert read(write({key: 1.0})).rope_scaling is None


def test_biases_of_queries_keys_and_values_are_optional(write: Write) -> None:
    biased = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    for arch in ("llama", "qwen3"):
        assert not read(write(arch=arch)).attention_bias
        assert read(write(arch=arch, **biased)).attention_bias


def _write_parts(folder: Path, count: int = 3) -> list[Path]:
    """A model in parts, each with a tensor of its own, and the key that says so."""
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama", split_max_tensors=1)
    for key, value in META.items():
        _add(writer, f"llama.{key}", value)
    for number in range(count):
        name = "token_embd.weight" if number == 0 else f"part{number}"
        writer.add_tensor(name, np.full((100, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("tiny-*.gguf"))


def test_any_part_of_a_split_file_is_the_whole_model(tmp_path: Path) -> None:
    parts = _write_parts(tmp_path)
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        files = find_model(str(part))
        assert (files.path, files.name) == (parts[0], "tiny")
        source = GgufSource(part)
        assert {name: source.tensors[name].file for name in source.tensors} == {
            "token_embd.weight": parts[0],
            "part1": parts[1],
            "part2": parts[2],
        }
        assert source.read("part2", slice(3, 4), slice(0, 2)).tolist() == [[2.0, 2.0]]
        assert model_config_from_gguf(source).vocab_size == 100


def test_a_folder_with_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    parts = _write_parts(tmp_path)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"")
    (tmp_path / "._tiny.gguf").write_bytes(b"")
    assert find_model(str(tmp_path)).path == parts[0]
    (tmp_path / "second.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelError, match=r"has several \.gguf models, name one of \['second', 'tiny'\]"):
        find_model(str(tmp_path))


def test_parts_that_are_missing_or_do_not_belong_together_are_named(tmp_path: Path) -> None:
    parts = _write_parts(tmp_path)
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        ModelError, match=r"tiny-00002-of-00003\.gguf says that it is part 2 .*expected 1 of 3"
    ):
        find_model(str(parts[0]))
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"one of 3 parts, of which tiny-00002-of-00003\.gguf are missing"):
        find_model(str(parts[2]))
    parts[1].write_bytes(second[:-4])
    with pytest.raises(WeightError, match=r"tiny-00002-of-00003\.gguf is truncated: tensor part1"):
        GgufSource(parts[0])
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"part 1 of a model in 3 parts, which must be named NAME-00001-of"):
        find_model(str(renamed))


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
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type 'longrope' is not supported"),
        ({"rope.scaling.type": "yarn"}, r"rope\.scaling\.factor is missing"),
        ({"rope.scaling.type": "linear"}, r"rope\.scaling\.factor is missing"),
        ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, r"attn_factor 1\.5 is not supported"),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.yarn_log_multiplier": 0.5,
            },
            r"yarn_log_multiplier 0\.5 is not supported, only 0 is",
        ),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0 is not supported, only 0 is"),
        ({"attention.causal": False}, r"attention\.causal False is not supported, only 1 is"),
        ({"logit_scale": 0.5}, r"logit_scale 0\.5 is not supported, only 1 is"),
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
