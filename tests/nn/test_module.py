"""The module at rest: an ordinary nnx module whose weights can be replaced in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from albireo_jax.core.config import Dtype
from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.decoder import unstack
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.random_weights import random_weights
from albireo_jax.nn.shapes import layer_name, weight_names
from albireo_jax.nn.sharding import make_mesh, named_sharding

TOKENS = jnp.asarray([3, 1, 4, 1, 5], jnp.int32)


@pytest.fixture
def unstacked(everything: ModelConfig) -> Decoder:
    """The same model as `model`, one array per layer."""
    mesh = make_mesh(2)
    form = LayerForm.UNSTACKED
    return Decoder(
        everything, random_weights(everything, dtype=Dtype.FLOAT32, mesh=mesh, seed=1, form=form), mesh
    )


def test_a_module_of_unstacked_layers_is_the_same_model(model: Decoder, unstacked: Decoder) -> None:
    state, config = nnx.state(unstacked, nnx.Param), model.config
    assert set(state) == set(weight_names(config))
    declared = nnx.to_pure_dict(nnx.get_named_sharding(state, model.mesh))
    for name, stacked in model.weights()._asdict().items():
        if stacked is None or not has_layers(name):
            continue
        own = nnx.to_pure_dict(state)[name]
        assert list(own) == list(range(config.num_layers))
        expected = named_sharding(model.mesh, layer_name(name))
        for number, layer in own.items():
            np.testing.assert_array_equal(layer, stacked[number])
            assert declared[name][number] == layer.sharding == expected
    assert all(isinstance(field, tuple) for field in unstacked.weights()[1:3])
    np.testing.assert_allclose(unstacked(TOKENS), model(TOKENS), rtol=0, atol=1e-5)


def test_a_module_of_unstacked_layers_can_be_split_merged_and_differentiated(unstacked: Decoder) -> None:
    graph, state = nnx.split(unstacked)
    np.testing.assert_array_equal(nnx.merge(graph, state)(TOKENS), unstacked(TOKENS))
    gradients = nnx.grad(lambda model: jnp.square(model(TOKENS)).mean())(unstacked)
    assert nnx.to_pure_dict(gradients)["w_down_LFD"][2].shape == (48, 32)


def test_either_form_takes_new_weights_in_either_form(model: Decoder, unstacked: Decoder) -> None:
    mesh, names = model.mesh, weight_names(model.config)
    stacked = random_weights(model.config, dtype=Dtype.FLOAT32, mesh=mesh, seed=2)
    layers = unstack(stacked)
    for module in (model, unstacked):
        before = module.weights()
        for tree in (
            stacked,
            layers,
            nnx.state(Decoder(model.config, layers, mesh)),
            {name: jax.tree.map(np.asarray, getattr(layers, name)) for name in names},
            {"w_down_LFD": list(layers.w_down_LFD)},
        ):
            module.replace_weights(before)
            module.replace_weights(tree)
            after = module.weights()
            jax.tree.map(np.testing.assert_array_equal, unstack(after).w_down_LFD, layers.w_down_LFD)
            assert jax.tree.structure(after) == jax.tree.structure(before)
            assert jax.tree.map(lambda array: array.sharding, after) == jax.tree.map(
                lambda array: array.sharding, before
            )
    assert not any(array.is_deleted() for array in jax.tree.leaves((stacked, layers)))


def test_nnx_sees_every_weight_with_its_sharding(model: Decoder) -> None:
    state = nnx.state(model, nnx.Param)
    assert set(state) == set(weight_names(model.config))
    declared = nnx.get_named_sharding(state, model.mesh)
    for name in weight_names(model.config):
        expected = named_sharding(model.mesh, name)
        assert nnx.to_pure_dict(declared)[name] == expected
        assert model.weights()._asdict()[name].sharding == expected


def test_a_model_can_be_split_merged_and_differentiated(model: Decoder) -> None:
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(TOKENS), model(TOKENS))

    def loss(model: Decoder) -> jax.Array:
        return -jax.nn.log_softmax(model(TOKENS[:-1]))[jnp.arange(4), TOKENS[1:]].mean()

    gradients = nnx.to_pure_dict(nnx.grad(loss)(model))
    assert set(gradients) == set(weight_names(model.config))
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in gradients.values())


def test_new_weights_are_taken_in_place_and_sharded_like_the_old(
    model: Decoder, everything: ModelConfig
) -> None:
    mesh = make_mesh(2)
    other = Decoder(everything, random_weights(everything, dtype=Dtype.FLOAT32, mesh=mesh, seed=2), mesh)
    expected, before = np.asarray(other(TOKENS)), np.asarray(model(TOKENS))
    assert np.abs(expected - before).max() > 0.01
    for tree in (
        other.weights(),
        nnx.state(other),
        {name: np.asarray(getattr(other.weights(), name)) for name in weight_names(everything)},
    ):
        model.replace_weights(jax.tree.map(jnp.zeros_like, model.weights()))
        assert np.abs(np.asarray(model(TOKENS)[:, :101])).max() == 0
        model.replace_weights(tree)
        np.testing.assert_array_equal(model(TOKENS), expected)
        assert model.wqkv_LDNXK[...].sharding == named_sharding(mesh, "wqkv_LDNXK")


def test_one_weight_can_be_replaced_alone(model: Decoder) -> None:
    before = model.weights()
    model.replace_weights({"final_norm_D": jnp.zeros(32)})
    after = model.weights()
    assert float(jnp.abs(after.final_norm_D).max()) == 0
    assert after._replace(final_norm_D=before.final_norm_D) == before


def test_the_arrays_given_stay_the_callers_own(model: Decoder) -> None:
    """A trainer may donate its arrays to its next step."""
    given = jnp.ones(32)
    model.replace_weights({"final_norm_D": given})
    given.delete()
    np.testing.assert_array_equal(model.weights().final_norm_D, np.ones(32))


def test_a_wrong_tree_replaces_nothing(model: Decoder) -> None:
    before = model.weights()
    good, gone = jnp.zeros(32), jnp.zeros(32)
    gone.delete()
    for tree, message in (
        ({"final_norm_D": good, "final_norm": good}, "no weight final_norm"),
        (
            {"final_norm_D": good, "k_norm_LK": jnp.zeros((3, 9))},
            r"k_norm_LK is float32 \(3, 9\), expected .*\(3, 8\)",
        ),
        ({"final_norm_D": good.astype(jnp.bfloat16)}, "final_norm_D is bfloat16"),
        (unstack(before)._replace(wo_LAD=(good,) * 2), "wo_LAD has 2 layers, expected 3"),
        (
            unstack(before)._replace(wo_LAD=(good,) * 3),
            r"wo_LAD of layer 0 is float32 \(32,\), expected float32 \(64, 32\)",
        ),
        ({"final_norm_D": (good,) * 3}, "final_norm_D is a tuple, expected one stacked array"),
        ({"final_norm_D": good, "q_norm_LK": None}, "q_norm_LK is a NoneType, expected one stacked array"),
        ({"layers": {"final_norm_D": good}}, "no weight layers"),
        ({"final_norm_D": gone}, "final_norm_D was deleted, or donated"),
    ):
        with pytest.raises(WeightError, match=message):
            model.replace_weights(tree)
    assert model.weights() == before


def test_a_module_refuses_weights_of_another_model(model: Decoder, everything: ModelConfig) -> None:
    weights, mesh = model.weights(), make_mesh(2)
    with pytest.raises(WeightError, match="lack bqkv_LNXK"):
        Decoder(everything, weights._replace(bqkv_LNXK=None), mesh)
    with pytest.raises(WeightError, match="the model has no weight lm_head_VD"):
        Decoder(dataclasses.replace(everything, tie_word_embeddings=True), weights, mesh)
    with pytest.raises(WeightError, match=r"embed_VD is float32 \(102, 32\), expected .*\(104, 32\)"):
        Decoder(everything, weights, make_mesh(4))


def test_a_module_takes_one_text_or_several_of_one_length(model: Decoder) -> None:
    expected = np.asarray(model(TOKENS))
    for form in (np.asarray(TOKENS), TOKENS.tolist(), np.asarray(TOKENS, np.uint8)):
        np.testing.assert_array_equal(model(form), expected)
    for batch in (np.stack([TOKENS, TOKENS]), [TOKENS.tolist()] * 2):
        np.testing.assert_allclose(model(batch), np.stack([expected] * 2), atol=1e-5)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (3, r"shape \[T\] or \[B, T\], got an array of int64 of shape \[\]"),
        (np.zeros((1, 1, 2), int), r"shape \[T\] or \[B, T\], got an array of int64 of shape \[1, 1, 2\]"),
        ([], r"shape \[T\] or \[B, T\], got an array of float64 of shape \[0\]"),
        ([[1], [2, 3]], r"shape \[T\] or \[B, T\], got \[\[1\], \[2, 3\]\]"),
        ([1.0], "must be integers"),
        ([True], "must be integers"),
        ("text", "must be integers"),
        (None, "must be integers"),
        ([1, 101], "token id 101 is outside the vocabulary of 101"),
        ([-1, 1], "token id -1 is outside the vocabulary of 101"),
        ([2**40], f"token id {2**40} is outside the vocabulary of 101"),
    ],
)
def test_other_token_ids_are_refused_with_the_shape_that_is_wanted(
    model: Decoder, token_ids: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(token_ids)
