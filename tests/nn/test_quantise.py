"""Quantised matrices: how near codes are, that they depend on nothing but the floats, and what is stored."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from albireo_jax.core.config import Dtype, EngineConfig, Quantization
from albireo_jax.core.errors import ModelError, WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.hf_config import model_config_from_hf, model_config_to_hf
from albireo_jax.core.memory import weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.models.llama import HF_NAMES
from albireo_jax.nn.checkpoint import restore_weights, save
from albireo_jax.nn.decoder import DecoderWeights, Projected, forward, queries_keys_values, unstack
from albireo_jax.nn.layers import causal_attention
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.quantise import CodedWeight, decode, dequantise, encode
from albireo_jax.nn.random_weights import random_weights
from albireo_jax.nn.shapes import SCALES, layer_name, unquantised, weight_names
from albireo_jax.nn.sharding import make_mesh, named_sharding
from albireo_jax.nn.tensors import SafetensorsSource
from albireo_jax.nn.weights import expected_tensors, load_weights

TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 101, 13), jnp.int32)
KINDS = list(Quantization)
WEIGHTS_ONLY = [Quantization.INT8, Quantization.FP8_W8A16]


@functools.cache
def make(config: ModelConfig, tp: int = 1, dtype: Dtype = Dtype.FLOAT32) -> Decoder:
    mesh = make_mesh(tp)
    return Decoder(config, random_weights(config, dtype=dtype, mesh=mesh, seed=3), mesh)


def quantised(config: ModelConfig, kind: Quantization) -> ModelConfig:
    return dataclasses.replace(config, quantization=kind)


def assert_same(one: DecoderWeights, other: DecoderWeights) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_is_as_near_as_its_kind_allows(kind: Quantization) -> None:
    """Channels of very different sizes, one of zeros, one that underflows, one of a single number."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 6)) * np.array([1.0, 1e-3, 1e4, 0.0, 1e-38, 0.0])
    w[7, 5] = -3.0
    w = jnp.asarray(w, jnp.float32)
    coded = encode(w, kind)
    assert coded.code.dtype.itemsize == 1
    assert coded.scale.dtype == jnp.float32
    near, scale = np.asarray(decode(coded), np.float64), np.asarray(coded.scale, np.float64)
    error, size = np.abs(near - np.asarray(w)), np.abs(np.asarray(w, np.float64))
    bound = scale / 2 if kind is Quantization.INT8 else np.maximum(size / 16, scale / 1024)
    assert np.all(error <= bound * (1 + 1e-6))
    largest = np.argmax(size[:, :3], axis=0)
    np.testing.assert_allclose(error[largest, range(3)] / size[largest, range(3)], 0, atol=1e-6)
    assert near[7, 5] == pytest.approx(-3.0)
    assert not near[:, 3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_and_harms_no_other_channel(kind: Quantization) -> None:
    w = jnp.ones((4, 3)).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
    near = np.asarray(decode(encode(w, kind)))
    assert not np.isfinite(near[:, :2]).all(axis=0).any()
    np.testing.assert_allclose(near[:, 2], 1, rtol=1e-6)


@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_a_model_computes_what_its_codes_stand_for(everything: ModelConfig, kind: Quantization) -> None:
    model = make(quantised(everything, kind), 2)
    same = Decoder(everything, dequantise(model.weights()), model.mesh)
    exact = make(everything, 2)
    found, wanted = np.asarray(model(TOKENS)), np.asarray(same(TOKENS))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    changed = np.abs(wanted - np.asarray(exact(TOKENS))).max()
    assert 1e-3 < changed < 0.2 * np.abs(wanted).max()


def test_a_model_whose_rows_are_rounded_too_has_the_same_codes(everything: ModelConfig) -> None:
    """It computes something else with them, no further away than rounding numbers by 1/16 may take it."""
    rounding, weights_only = (
        make(quantised(everything, kind), 2) for kind in (Quantization.FP8, WEIGHTS_ONLY[1])
    )
    assert_same(rounding.weights(), weights_only.weights())
    found, near = np.asarray(rounding(TOKENS)), np.asarray(weights_only(TOKENS))
    assert 1e-3 < np.abs(found - near).max() < 0.2 * np.abs(near).max()


def test_in_bfloat16_only_activations_are_rounded(everything: ModelConfig) -> None:
    model = make(quantised(everything, Quantization.INT8), 2, Dtype.BFLOAT16)
    assert {array.dtype for array in jax.tree.leaves(model.weights())} == {
        jnp.dtype(dtype) for dtype in ("bfloat16", "int8", "float32")
    }
    same = Decoder(everything, dequantise(model.weights()), model.mesh)
    found, wanted = np.asarray(model(TOKENS)), np.asarray(same(TOKENS))
    assert 1e-6 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_codes_and_logits_do_not_depend_on_the_degree(everything: ModelConfig) -> None:
    """Ranks share the inputs of two matrices, whose scales are of all of them."""
    config = quantised(everything, Quantization.INT8)
    one, wanted = make(config).weights(), np.asarray(make(config)(TOKENS))
    for tp in (2, 8):
        other = make(config, tp).weights()
        for name in ("wo_LAD", "w_gate_up_LD2F", "w_down_LFD"):
            for field in (name, SCALES[name]):
                np.testing.assert_array_equal(getattr(other, field), getattr(one, field))
        for name in weight_names(config):
            assert getattr(other, name).sharding == named_sharding(make_mesh(tp), name)
        assert other.wqkv_scale_LNXK.shape == other.wqkv_LDNXK[:, 0].shape
        np.testing.assert_allclose(make(config, tp)(TOKENS), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tp", "dtype"), [(1, Dtype.FLOAT32), (2, Dtype.BFLOAT16), (8, Dtype.FLOAT32)])
def test_shards_take_the_bytes_that_the_memory_plan_counts(
    everything: ModelConfig, tp: int, dtype: Dtype
) -> None:
    """The last degree has more ranks than key/value heads."""
    config = quantised(everything, Quantization.INT8)
    arrays = jax.tree.leaves(make(config, tp, dtype).weights())
    held = sum(array.addressable_shards[tp - 1].data.nbytes for array in arrays)
    assert held == weight_bytes(config, tp=tp, dtype=dtype)


def test_all_layer_loops_compute_the_same(everything: ModelConfig) -> None:
    config = quantised(everything, Quantization.INT8)
    weights = make(config).weights()

    def hidden(weights: DecoderWeights, *, unroll: bool) -> np.ndarray:
        def attend(layer: Any, projected: Projected, cache: None) -> Any:
            q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
            return causal_attention(q_TNGK, k_TNK, v_TNK, sliding_window=config.sliding_window), cache

        position_T = jnp.arange(len(TOKENS), dtype=jnp.int32)
        run = functools.partial(forward, config, unroll=unroll, cache=None, attend=attend)
        return np.asarray(jax.jit(run)(weights, TOKENS, position_T=position_T)[0])

    scanned = hidden(weights, unroll=False)
    for other in (weights, unstack(weights)):
        np.testing.assert_allclose(hidden(other, unroll=True), scanned, rtol=0, atol=1e-5)


def test_files_random_weights_and_checkpoints_are_quantised_alike(
    everything: ModelConfig, tmp_path: Path
) -> None:
    """All make, layer by layer, the codes of the floats that they would give unquantised, in either form."""
    kind = Quantization.FP8
    rng, mesh, config = np.random.default_rng(0), make_mesh(4), quantised(everything, kind)
    shapes = expected_tensors(everything, HF_NAMES)
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    source = SafetensorsSource(tmp_path)
    restorable = dataclasses.replace(everything, attention_bias=False, rope_scaling=None)
    save(make(restorable, 2), tmp_path / "saved")

    def load(config: ModelConfig, form: LayerForm = LayerForm.STACKED) -> DecoderWeights:
        return load_weights(source, HF_NAMES, config=config, dtype=Dtype.BFLOAT16, mesh=mesh, form=form)

    def draw(config: ModelConfig, form: LayerForm = LayerForm.STACKED) -> DecoderWeights:
        return random_weights(config, dtype=Dtype.BFLOAT16, mesh=mesh, seed=8, form=form)

    def restore(config: ModelConfig, form: LayerForm = LayerForm.STACKED) -> DecoderWeights:
        own = dataclasses.replace(restorable, quantization=config.quantization)
        return restore_weights(tmp_path / "saved", config=own, mesh=mesh, form=form)

    for weights_of in (load, draw, restore):
        floats, codes = weights_of(everything), weights_of(config)
        layers = weights_of(config, LayerForm.UNSTACKED)
        assert_same(layers, unstack(codes))
        assert_same(weights_of(everything, LayerForm.UNSTACKED), unstack(floats))
        for name, field in layers._asdict().items():
            if isinstance(field, tuple):
                assert {array.sharding for array in field} == {named_sharding(mesh, layer_name(name))}
        for name, scale_name in SCALES.items():
            wanted = jax.vmap(functools.partial(encode, kind=kind))(getattr(floats, name))
            found = CodedWeight(getattr(codes, name), getattr(codes, scale_name))
            for array, expected in zip(found, wanted, strict=True):
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array, expected)
        kept = set(weight_names(everything)) - set(SCALES)
        for name in kept - {"bqkv_LNXK"}:
            np.testing.assert_array_equal(getattr(codes, name), getattr(floats, name))


def test_new_weights_come_as_floats_or_as_codes(everything: ModelConfig) -> None:
    config, mesh = quantised(everything, Quantization.INT8), make_mesh(2)
    floats, wanted = make(everything, 2).weights(), make(config, 2).weights()
    before = jax.tree.map(jnp.zeros_like, wanted)
    model = Decoder(config, before, mesh)
    for tree in (
        floats,
        wanted,
        {name: np.asarray(getattr(floats, name)) for name in weight_names(everything)},
        unstack(floats),
        unstack(wanted),
    ):
        model.replace_weights(before)
        model.replace_weights(tree)
        assert_same(model.weights(), wanted)
        assert model.weights().w_down_LFD.sharding == named_sharding(mesh, "w_down_LFD")
    layers = Decoder(config, unstack(before), mesh)
    for tree in (floats, wanted, unstack(floats), unstack(wanted)):
        layers.replace_weights(before)
        layers.replace_weights(tree)
        assert_same(layers.weights(), unstack(wanted))
    for wrong, message in (
        (wanted.w_down_LFD.astype(jnp.int16), "w_down_LFD is int16 .*, expected int8"),
        (floats.w_down_LFD[:, :5], r"w_down_LFD is float32 \(3, 5, 32\), expected float32 \(3, 48, 32\)"),
    ):
        with pytest.raises(WeightError, match=message):
            model.replace_weights({"final_norm_D": jnp.zeros(32), "w_down_LFD": wrong})
    assert_same(model.weights(), wanted)


def test_weights_must_be_as_quantised_as_the_model(everything: ModelConfig) -> None:
    config, mesh = quantised(everything, Quantization.INT8), make_mesh(2)
    floats, codes = make(everything, 2).weights(), make(config, 2).weights()
    with pytest.raises(WeightError, match="weights lack wqkv_scale_LNXK, wo_scale_LD"):
        Decoder(config, floats, mesh)
    with pytest.raises(WeightError, match=r"wqkv_LDNXK is int8 .*, expected float32"):
        Decoder(everything, codes, mesh)
    with pytest.raises(WeightError, match=r"is int8 .*, expected float8_e4m3fn"):
        Decoder(quantised(everything, Quantization.FP8), codes, mesh)


def test_what_is_quantised_is_not_saved_as_if_it_were_whole(everything: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights quantised to int8 have no canonical form"):
        save(make(quantised(everything, Quantization.INT8)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_kinds_that_are_not_known_are_refused(llama: ModelConfig) -> None:
    with pytest.raises(
        ValueError, match=r"quantization must be one of \['int8', 'fp8', 'fp8_w8a16'\], got 'int4'"
    ):
        EngineConfig(model="x", quantization="int4")  # type: ignore[arg-type]
    stored = json.loads(json.dumps(model_config_to_hf(unquantised(llama))))
    with pytest.raises(ModelError, match=r"quantization_config .*awq.* is not supported; load float weights"):
        model_config_from_hf({**stored, "quantization_config": {"quant_method": "awq"}})
