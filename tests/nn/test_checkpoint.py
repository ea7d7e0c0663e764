"""Checkpoints: the same model at any degree, and errors that name what is missing."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.core.errors import ModelError, WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.hf_config import model_config_from_hf, model_config_to_hf
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import ModelFormat, find_model
from albireo_jax.models.registry import load_model, model_config, random_model
from albireo_jax.nn.canonical import canonical_shapes, from_canonical, to_canonical
from albireo_jax.nn.checkpoint import restore, save
from albireo_jax.nn.decoder import unstack
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import make_mesh


@pytest.fixture
def config(everything: ModelConfig) -> ModelConfig:
    """As many parts as a real architecture has, so that config.json can tell them."""
    qwen3 = {"attention_bias": False, "rope_scaling": None, "eos_token_ids": (2, 5), "bos_token_id": 1}
    return dataclasses.replace(everything, **qwen3)


def assert_same(one: Decoder, other: Decoder) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.weights(), other.weights())
    jax.tree.map(
        lambda a, b: a.sharding == b.sharding or pytest.fail("sharding"), one.weights(), other.weights()
    )


@pytest.mark.parametrize(("saved", "restored"), [(1, 4), (4, 1), (2, 8), (8, 2)])
def test_a_checkpoint_restores_at_another_degree(
    saved: int, restored: int, config: ModelConfig, tmp_path: Path
) -> None:
    def make(tp: int) -> Decoder:
        return random_model(config, dtype=Dtype.FLOAT32, mesh=make_mesh(tp), seed=0)

    save(make(saved), tmp_path / "model")
    assert_same(restore(tmp_path / "model", make_mesh(restored)), make(restored))


@pytest.mark.parametrize("saved", LayerForm)
@pytest.mark.parametrize("restored", LayerForm)
def test_a_checkpoint_of_either_form_restores_in_either(
    saved: LayerForm, restored: LayerForm, config: ModelConfig, tmp_path: Path
) -> None:
    def make(tp: int, form: LayerForm) -> Decoder:
        return random_model(config, dtype=Dtype.FLOAT32, mesh=make_mesh(tp), seed=0, form=form)

    save(make(2, saved), tmp_path / "model")
    assert_same(restore(tmp_path / "model", make_mesh(8), form=restored), make(8, restored))
    again = load_model(
        find_model(str(tmp_path / "model")),
        config=config,
        dtype=Dtype.FLOAT32,
        mesh=make_mesh(1),
        form=restored,
    )
    assert_same(again, make(1, restored))


def test_a_checkpoint_is_found_and_loaded_like_any_model(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config, dtype=Dtype.BFLOAT16, mesh=make_mesh(1), seed=0)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    save(model, tmp_path / "saved", extra_files=[tokenizer])
    files = find_model(str(tmp_path / "saved"))
    assert (files.format, files.name) == (ModelFormat.ORBAX, "saved")
    assert (files.path / "tokenizer.json").read_text() == "{}"
    assert model_config(files) == config
    again = load_model(files, config=config, dtype=Dtype.BFLOAT16, mesh=make_mesh(1))
    assert type(again) is type(model)
    assert_same(again, model)
    wide = restore(files.path, make_mesh(1), dtype=Dtype.FLOAT32).weights()
    assert wide.embed_VD.dtype == jnp.float32
    np.testing.assert_array_equal(wide.embed_VD, model.weights().embed_VD.astype(jnp.float32))


def test_canonical_weights_forget_the_degree(everything: ModelConfig) -> None:
    first = None
    for tp in (1, 2, 8):
        mesh = make_mesh(tp)
        model = random_model(everything, dtype=Dtype.FLOAT32, mesh=mesh, seed=4)
        canonical = to_canonical(everything, model.weights(), mesh)
        assert {name: array.shape for name, array in canonical.items()} == canonical_shapes(everything)
        arrays = {name: np.asarray(array) for name, array in canonical.items()}
        first = first or arrays
        jax.tree.map(np.testing.assert_array_equal, arrays, first)
        layers = to_canonical(everything, unstack(model.weights()), mesh)
        back = from_canonical(everything, canonical, mesh)
        assert not canonical
        jax.tree.map(np.testing.assert_array_equal, back, model.weights())
        back = from_canonical(everything, layers, mesh, form=LayerForm.UNSTACKED)
        jax.tree.map(np.testing.assert_array_equal, back, unstack(model.weights()))


def test_random_weights_differ_by_seed_and_layer_and_keep_their_scale(everything: ModelConfig) -> None:
    def draw(seed: int) -> np.ndarray:
        model = random_model(everything, dtype=Dtype.FLOAT32, mesh=make_mesh(1), seed=seed)
        return np.asarray(model.weights().w_gate_up_LD2F)

    first, second = draw(0), draw(1)
    for one, other in ((first, second), (first[0], first[1]), (first[:, :, 0], first[:, :, 1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05
    assert first.std() == pytest.approx(32**-0.5, rel=0.02)
    assert abs(first.mean()) < 0.01
    assert len(np.unique(first)) > 0.99 * first.size


def test_nothing_is_overwritten(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save(random_model(config, dtype=Dtype.FLOAT32, mesh=make_mesh(1), seed=0), tmp_path)


def test_a_broken_checkpoint_is_refused_by_name(config: ModelConfig, tmp_path: Path) -> None:
    folder, mesh = tmp_path / "model", make_mesh(1)
    save(random_model(config, dtype=Dtype.FLOAT32, mesh=mesh, seed=0), folder)
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "intermediate_size": 40}))
    with pytest.raises(WeightError, match=r"w_down_LFD has shape \(3, 48, 32\), expected \(3, 40, 32\)"):
        restore(folder, mesh)
    (folder / "config.json").write_text(json.dumps(shape))
    metadata = folder / "weights" / "_METADATA"
    content = metadata.read_bytes()
    metadata.write_bytes(bytes(len(content)))
    with pytest.raises(WeightError, match=r"weights is missing or broken"):
        restore(folder, mesh)
    metadata.write_bytes(content[:-1])
    with pytest.raises(
        WeightError, match=rf"_METADATA has {len(content) - 1} bytes, expected {len(content)}"
    ):
        restore(folder, mesh)
    metadata.unlink()
    with pytest.raises(WeightError, match=rf"_METADATA has no bytes, expected {len(content)}"):
        restore(folder, mesh)
    (folder / "albireo.json").write_text("{}")
    with pytest.raises(WeightError, match=r"albireo\.json is missing or broken"):
        restore(folder, mesh)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        restore(folder, mesh)


def test_config_json_tells_all_of_a_real_architecture(llama: ModelConfig, everything: ModelConfig) -> None:
    scaled = dataclasses.replace(
        everything, architecture="LlamaForCausalLM", qk_norm=False, attention_bias=False
    )
    for config in (
        llama,
        dataclasses.replace(scaled, sliding_window=None),
        dataclasses.replace(llama, architecture="MistralForCausalLM", sliding_window=9),
        dataclasses.replace(llama, architecture="Qwen2ForCausalLM", attention_bias=True, sliding_window=5),
        dataclasses.replace(llama, architecture="Qwen3ForCausalLM", qk_norm=True, eos_token_ids=(3,)),
    ):
        assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(config)))) == config
