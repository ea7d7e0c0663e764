"""Forward and logits: the same numbers in every form, the right collectives, the cache in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from albireo_jax.core.config import Dtype
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.decoder import (
    forward,
    head,
    layer_weights,
    logits,
    queries_keys_values,
    unstack,
    weight_specs,
)
from albireo_jax.nn.layers import causal_attention
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.random_weights import random_weights
from albireo_jax.nn.sharding import TP, make_mesh

TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 101, 13), jnp.int32)


@functools.cache
def make(config: ModelConfig, tp: int, dtype: Dtype = Dtype.FLOAT32) -> Decoder:
    mesh = make_mesh(tp)
    return Decoder(config, random_weights(config, dtype=dtype, mesh=mesh, seed=3), mesh)


def program(model: Decoder, *, unroll: bool, weights: Any = None) -> Any:
    """A sharded forward pass that also notes in a cache, per layer, the sum of the keys it saw."""
    config, weights = model.config, model.weights() if weights is None else weights

    def local(weights, token_T, cache_LN):
        def attend(layer, projected, cache_LN):
            q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
            cache_LN = cache_LN.at[layer].add(k_TNK.sum(axis=(0, 2)).astype(cache_LN.dtype))
            return causal_attention(q_TNGK, k_TNK, v_TNK, sliding_window=config.sliding_window), cache_LN

        hidden_TD, cache_LN = forward(
            config,
            weights,
            token_T,
            position_T=jnp.arange(token_T.shape[0], dtype=jnp.int32),
            cache=cache_LN,
            attend=attend,
            axis=TP,
            unroll=unroll,
        )
        return logits(config, head(weights), hidden_TD, axis=TP), cache_LN

    specs = (weight_specs(weights), P(), P(None, TP))
    return jax.jit(
        jax.shard_map(local, mesh=model.mesh, in_specs=specs, out_specs=(P(None, TP), P(None, TP)))
    )


def run(model: Decoder, **form: Any) -> tuple[np.ndarray, np.ndarray]:
    heads = model.config.kv_heads_at(model.mesh.shape[TP])
    weights = form.get("weights") or model.weights()
    out, cache = program(model, **form)(weights, TOKENS, jnp.zeros((3, heads)))
    return np.asarray(out), np.asarray(cache)


def test_scanned_unrolled_and_unstacked_loops_are_one_function(everything: ModelConfig) -> None:
    model = make(everything, 2)
    scanned, scanned_cache = run(model, unroll=False)
    assert np.all(np.abs(scanned_cache) > 0)
    for form in ({"unroll": True}, {"unroll": True, "weights": unstack(model.weights())}):
        unrolled, unrolled_cache = run(model, **form)
        np.testing.assert_allclose(unrolled, scanned, rtol=0, atol=1e-5)
        np.testing.assert_allclose(unrolled_cache, scanned_cache, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 4, 8])
def test_logits_do_not_depend_on_the_degree(everything: ModelConfig, tp: int) -> None:
    expected = np.asarray(make(everything, 2)(TOKENS))
    out, _ = run(make(everything, tp), unroll=False)
    np.testing.assert_allclose(out[:, :101], expected, rtol=0, atol=1e-5)
    assert np.all(np.isneginf(out[:, 101:]))


def test_bfloat16_stays_near_float32(llama: ModelConfig) -> None:
    exact = np.asarray(make(llama, 1)(TOKENS))
    near = np.asarray(make(llama, 2, Dtype.BFLOAT16)(TOKENS))
    assert near.dtype == np.float32
    assert 1e-6 < np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


def test_a_pass_is_two_all_reduces_per_layer_and_one_for_the_embedding(everything: ModelConfig) -> None:
    model = make(everything, 2)
    traced = {unroll: program(model, unroll=unroll) for unroll in (False, True)}
    arguments = model.weights(), TOKENS, jnp.zeros((3, 2))
    assert str(jax.make_jaxpr(traced[True])(*arguments)).count(" psum") == 2 * everything.num_layers + 1
    assert str(jax.make_jaxpr(traced[False])(*arguments)).count(" psum") == 3  # one layer, and the embedding
    compiled = traced[True].lower(*arguments).compile().as_text()
    assert compiled.count(" all-reduce(") == 2 * everything.num_layers + 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {other}(" not in compiled


def test_the_cache_is_carried_and_never_copied(llama: ModelConfig) -> None:
    weights = make(llama, 1).weights()

    def step(token_T, cache_LC):
        def attend(layer, projected, cache_LC):
            q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
            return causal_attention(q_TNGK, k_TNK, v_TNK), cache_LC.at[layer, 0].add(k_TNK.sum())

        position_T = jnp.arange(token_T.shape[0], dtype=jnp.int32)
        return forward(llama, weights, token_T, position_T=position_T, cache=cache_LC, attend=attend)

    cache = jnp.zeros((3, 1 << 20))
    memory = jax.jit(step, donate_argnums=1).lower(TOKENS, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 4


def test_unstacked_weights_want_the_unrolled_loop(llama: ModelConfig) -> None:
    weights = unstack(make(llama, 1).weights())
    assert isinstance(weights.wqkv_LDNXK, tuple)
    np.testing.assert_array_equal(layer_weights(weights, 1).w_down_FD, weights.w_down_LFD[1])
    with pytest.raises(ValueError, match="unstacked weights need the unrolled layer loop"):
        jax.eval_shape(lambda layer: layer_weights(weights, layer), jnp.int32(1))
