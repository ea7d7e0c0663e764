"""Streaming of checkpoints: what each device reads, and errors that name file, tensor and shape."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from albireo_jax.core.config import Dtype, Quantization
from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.models.llama import HF_NAMES
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.sharding import make_mesh
from albireo_jax.nn.tensors import SafetensorsSource, StoredTensor
from albireo_jax.nn.weights import expected_tensors, load_weights

Tensors = dict[str, np.ndarray]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def tensors(everything: ModelConfig) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = expected_tensors(everything, HF_NAMES)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def load(tmp_path: Path, everything: ModelConfig) -> Callable[..., DecoderWeights]:
    def load(tensors: Tensors | None = None, *, tp: int = 1, dtype: Dtype = Dtype.FLOAT32) -> DecoderWeights:
        if tensors is not None:
            save_file(tensors, tmp_path / "model.safetensors")
        source = SafetensorsSource(tmp_path)
        return load_weights(source, HF_NAMES, config=everything, dtype=dtype, mesh=make_mesh(tp))

    return load


class Recorder:
    """A source that notes the bytes of every read."""

    def __init__(self, source: SafetensorsSource) -> None:
        self._source = source
        self.reads: list[tuple[str, int]] = []

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._source.tensors

    def read(self, name: str, *index: slice) -> Any:
        part = self._source.read(name, *index)
        self.reads.append((name, part.nbytes))
        return part


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_each_device_reads_its_slice_and_no_more(
    tp: int, tensors: Tensors, tmp_path: Path, everything: ModelConfig
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    source = Recorder(SafetensorsSource(tmp_path))
    load_weights(source, HF_NAMES, config=everything, dtype=Dtype.FLOAT32, mesh=make_mesh(tp))
    read: dict[str, int] = {}
    for name, num_bytes in source.reads:
        read[name] = read.get(name, 0) + num_bytes
    for name, tensor in tensors.items():
        if "norm" in name:
            continue
        is_kv = "k_proj" in name or "v_proj" in name
        copies = max(1, tp // everything.num_kv_heads) if is_kv else 1
        assert read[name] == tensor.nbytes * copies, name
    largest = max(num_bytes for name, num_bytes in source.reads if name == Q_PROJ)
    assert largest == tensors[Q_PROJ].nbytes // tp


@pytest.mark.parametrize("quantization", [None, Quantization.INT8])
def test_unstacked_layers_are_made_one_by_one_and_held_once(
    quantization: Quantization | None, tensors: Tensors, tmp_path: Path, everything: ModelConfig
) -> None:
    """While weights are read, nothing lies on the devices but finished arrays and one layer of one field."""
    save_file(tensors, tmp_path / "model.safetensors")
    mesh, config = make_mesh(2), dataclasses.replace(everything, quantization=quantization)
    before = {id(array) for array in jax.live_arrays()}
    held: list[int] = []

    class Watcher(Recorder):
        def read(self, name: str, *index: slice) -> Any:
            held.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in before))
            return super().read(name, *index)

    source = Watcher(SafetensorsSource(tmp_path))
    weights = load_weights(
        source, HF_NAMES, config=config, dtype=Dtype.FLOAT32, mesh=mesh, form=LayerForm.UNSTACKED
    )
    total = sum(array.nbytes for array in jax.tree.leaves(weights))
    largest_layer = 4 * max(tensor.size for tensor in tensors.values()) * 2
    assert max(held) <= total + largest_layer
    assert sorted(held) == held or quantization is not None


def test_weights_hold_the_tensors_head_by_head(tensors: Tensors, load: Callable[..., DecoderWeights]) -> None:
    layer = "model.layers.2."
    for tp, kv_head, rank in ((1, 1, 1), (8, 1, 6)):
        weights = load(tensors, tp=tp)
        queries = weights.wqkv_LDNXK.shape[3] - 2
        heads = np.asarray(weights.wqkv_LDNXK)[2, :, rank]
        q = tensors[layer + "self_attn.q_proj.weight"].reshape(8, 8, 32)
        k = tensors[layer + "self_attn.k_proj.weight"].reshape(2, 8, 32)
        v = tensors[layer + "self_attn.v_proj.weight"].reshape(2, 8, 32)
        for query in range(queries):
            np.testing.assert_array_equal(heads[:, query], q[rank * queries + query].T)
        np.testing.assert_array_equal(heads[:, -2], k[kv_head].T)
        np.testing.assert_array_equal(heads[:, -1], v[kv_head].T)
        bias = np.asarray(weights.bqkv_LNXK)[2, rank]
        np.testing.assert_array_equal(
            bias[-1], tensors[layer + "self_attn.v_proj.bias"].reshape(2, 8)[kv_head]
        )
        up = np.asarray(weights.w_gate_up_LD2F)[2, :, 1]
        np.testing.assert_array_equal(up, tensors[layer + "mlp.up_proj.weight"].T)
        embed = np.asarray(weights.embed_VD)
        np.testing.assert_array_equal(embed[:101], tensors["model.embed_tokens.weight"])
        assert not embed[101:].any()


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_any_float_is_converted_at_load(
    stored: Any, dtype: Dtype, tensors: Tensors, load: Callable[..., DecoderWeights]
) -> None:
    small = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    weights = load(small, dtype=dtype)
    assert {array.dtype for array in jax.tree.leaves(weights)} == {jnp.dtype(dtype.value)}
    expected = small["model.norm.weight"].astype(jnp.dtype(dtype.value))
    np.testing.assert_array_equal(np.asarray(weights.final_norm_D), expected)


def test_harmless_extras_are_ignored(tensors: Tensors, tmp_path: Path, everything: ModelConfig) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tied = dataclasses.replace(everything, tie_word_embeddings=True)
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    weights = load_weights(source, HF_NAMES, config=tied, dtype=Dtype.FLOAT32, mesh=make_mesh(1))
    assert weights.lm_head_VD is None


def test_a_wrong_tensor_is_named_with_its_file(tensors: Tensors, load: Callable[..., DecoderWeights]) -> None:
    q = tensors[Q_PROJ]
    without = {name: tensor for name, tensor in tensors.items() if name != Q_PROJ}
    for changed, message in (
        (without, rf"model\.safetensors: missing tensor {Q_PROJ}, which Qwen3ForCausalLM needs"),
        ({**tensors, "model.extra.weight": q}, r"model\.safetensors: unused tensor model\.extra\.weight"),
        (
            {**tensors, Q_PROJ: q[:-1]},
            rf"model\.safetensors: tensor {Q_PROJ} has shape \(63, 32\), expected \(64, 32\)",
        ),
        ({**tensors, Q_PROJ: q.astype(np.int8)}, rf"tensor {Q_PROJ} is of I8, expected floats"),
        ({"model.norm.weight": tensors["model.norm.weight"]}, r"missing tensors .*, .* and \d+ more"),
    ):
        with pytest.raises(WeightError, match=message):
            load(changed)


def _shard(tensors: Tensors, folder: Path) -> list[Path]:
    """Two shards and their index."""
    names = sorted(tensors)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:half], names[half:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / "model-0.safetensors", folder / "model-1.safetensors"]


def test_shards_load_like_one_file(
    tensors: Tensors, tmp_path: Path, load: Callable[..., DecoderWeights]
) -> None:
    whole = load(tensors)
    (tmp_path / "model.safetensors").unlink()
    _shard(tensors, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(), whole)


def test_a_broken_shard_is_named(
    tensors: Tensors, tmp_path: Path, load: Callable[..., DecoderWeights]
) -> None:
    first, second = _shard(tensors, tmp_path)
    good = second.read_bytes()

    def fails(message: str) -> None:
        with pytest.raises(WeightError, match=message):
            load()

    for broken in (good[:-5], good[:4], b"", b"\xff" * 100):
        second.write_bytes(broken)
        fails(r"model-1\.safetensors is truncated or not a safetensors file")
    second.unlink()
    fails(r"model-1\.safetensors is missing")
    shutil.copyfile(first, second)
    fails(r"model-1\.safetensors has no tensor .*, which model\.safetensors\.index\.json places there")
    for index in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        fails(r"index\.json is not an index of safetensors files")


def test_a_folder_without_weights_says_so(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(WeightError, match="has no safetensors file"):
        SafetensorsSource(tmp_path)
    _shard(tensors, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightError, match=r"has 2 safetensors files but no model\.safetensors\.index\.json"):
        SafetensorsSource(tmp_path)


STRAY = (".DS_Store", "._model.safetensors", ".model.safetensors.swp", "training_args.bin", "README.md")


@pytest.mark.parametrize("others", [("consolidated",), ("adapter_model",), ("consolidated", "adapter_model")])
def test_the_models_own_file_is_taken_among_others(
    tensors: Tensors, load: Callable[..., DecoderWeights], tmp_path: Path, others: tuple[str, ...]
) -> None:
    expected = load(tensors)
    for name in STRAY:
        (tmp_path / name).write_bytes(b"stray")
    (tmp_path / "original").mkdir()
    save_file({"tok_embeddings.weight": np.zeros(3)}, tmp_path / "original" / "consolidated.00.safetensors")
    for name in others:
        save_file({"layers.0.wq.weight": np.zeros(3)}, tmp_path / f"{name}.safetensors")
        index = {"weight_map": {"layers.0.wq.weight": f"{name}.safetensors"}}
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    (tmp_path / "weights.safetensors").rename(tmp_path.parent / "blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path.parent / "blob")
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    (tmp_path.parent / "blob").unlink()
    with pytest.raises(WeightError, match=r"model\.safetensors is missing, it is a link to .*blob"):
        load()


def _save_shards(tensors: Tensors, folder: Path, count: int = 2) -> list[Path]:
    """Shards as transformers names them, without an index."""
    names = sorted(tensors)
    files = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::count]}, file)
    return files


def test_shards_without_an_index_are_loaded_if_all_are_there(
    tensors: Tensors, load: Callable[..., DecoderWeights], tmp_path: Path
) -> None:
    expected = load(tensors)
    (tmp_path / "model.safetensors").unlink()
    _, second = _save_shards(tensors, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    second.rename(tmp_path / "aside")
    with pytest.raises(WeightError, match=r"lacks model-00002-of-00002\.safetensors of 00002 shards"):
        load()
    (tmp_path / "aside").rename(tmp_path / "other-00001-of-00001.safetensors")
    with pytest.raises(WeightError, match="has shards of 2 sets of files"):
        load()


def test_an_index_decides_which_files_are_the_model(
    tensors: Tensors, load: Callable[..., DecoderWeights], tmp_path: Path
) -> None:
    expected = load(tensors)
    stale = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(stale))
    jax.tree.map(np.testing.assert_array_equal, load(), expected)  # none of its files is there
    save_file({name: array * 0 for name, array in tensors.items()}, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.fp32.safetensors.index.json")
    jax.tree.map(np.testing.assert_array_equal, load(), expected)
    outside = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "model.fp32.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(WeightError, match=r"places tensor x in \.\./model\.safetensors, which is outside"):
        load()


def test_a_tensor_in_two_shards_is_named(
    tensors: Tensors, load: Callable[..., DecoderWeights], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    save_file({Q_PROJ: tensors[Q_PROJ]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightError, match=rf"00002-of-00002\.safetensors: tensor {Q_PROJ} is there twice"):
        load()


def test_a_folder_without_the_models_weights_says_what_it_has(
    load: Callable[..., DecoderWeights], tmp_path: Path
) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(WeightError, match=r"has no safetensors file$"):
        load()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightError, match=r"no safetensors file, only pytorch_model\.bin; convert it"):
        load()
    save_file({"x": np.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightError, match=r"only adapter_model\.safetensors, an adapter; merge it"):
        load()
