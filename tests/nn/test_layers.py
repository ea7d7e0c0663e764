"""Layers equal their formulas, computed by loops or in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from albireo_jax.core.model_config import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from albireo_jax.nn.layers import (
    causal_attention,
    embed,
    gated_mlp,
    rms_norm,
    rope_frequencies,
    rotate,
    rotation,
)
from albireo_jax.nn.sharding import TP, make_mesh


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_rms_norm_is_its_formula_and_keeps_the_dtype(rng: np.random.Generator) -> None:
    x, weight = rng.normal(size=(5, 3, 8)) * 3, rng.normal(size=8)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    out = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    low = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), 1e-5)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=0.02, atol=0.01)


def test_gated_mlp_is_its_formula(rng: np.random.Generator) -> None:
    x, gate_up, down = rng.normal(size=(4, 6)), rng.normal(size=(6, 2, 10)), rng.normal(size=(10, 6))
    gate = x @ gate_up[:, 0]
    expected = (gate / (1 + np.exp(-gate)) * (x @ gate_up[:, 1])) @ down
    out = gated_mlp(*(jnp.asarray(array, jnp.float32) for array in (x, gate_up, down)))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_attention_is_its_formula(rng: np.random.Generator, window: int | None) -> None:
    num_tokens, kv_heads, queries, width = 7, 2, 3, 4
    q = rng.normal(size=(num_tokens, kv_heads, queries, width))
    k, v = rng.normal(size=(2, num_tokens, kv_heads, width))
    expected = np.zeros_like(q)
    for token in range(num_tokens):
        first = max(0, token - (window or num_tokens) + 1)
        for head in range(kv_heads):
            scores = q[token, head] @ k[first : token + 1, head].T / math.sqrt(width)
            weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            expected[token, head] = weights @ v[first : token + 1, head]
    out = causal_attention(*(jnp.asarray(array, jnp.float32) for array in (q, k, v)), sliding_window=window)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_sharded_embedding_gives_the_rows_of_a_whole_one(rng: np.random.Generator, tp: int) -> None:
    table = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)
    tokens = jnp.asarray([0, 11, 5, 6, 6, 3], jnp.int32)

    def local(table_vD, token_T):
        return embed(table_vD, token_T, axis=TP)

    sharded = jax.shard_map(local, mesh=make_mesh(tp), in_specs=(P(TP, None), P()), out_specs=P())
    np.testing.assert_array_equal(jax.jit(sharded)(table, tokens), table[tokens])
    np.testing.assert_array_equal(embed(table, tokens), table[tokens])


def test_rotation_keeps_lengths_and_depends_on_distances_only(rng: np.random.Generator) -> None:
    frequencies = rope_frequencies(8, 1e4, None)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32)

    def score(q_position: int, k_position: int) -> float:
        by_q = rotation(jnp.asarray([q_position], jnp.int32), frequencies)
        by_k = rotation(jnp.asarray([k_position], jnp.int32), frequencies)
        return float(jnp.vdot(rotate(q, by_q), rotate(k, by_k)))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-3)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-2)
    turned = rotate(q, rotation(jnp.asarray([33], jnp.int32), frequencies))
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def test_frequencies_are_scaled_as_configured() -> None:
    plain = rope_frequencies(64, 5e5, None)
    np.testing.assert_allclose(plain, 5e5 ** (-np.arange(0, 64, 2) / 64), rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(64, 5e5, LinearRopeScaling(factor=4.0)), plain / 4, rtol=1e-6)
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    scaled = rope_frequencies(64, 5e5, scaling)
    wavelengths = 2 * math.pi / plain.astype(np.float64)
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.sum() > 1
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_yarn_keeps_fast_waves_and_slows_those_that_never_turned() -> None:
    """Over 4,096 positions, base 1e4 and 64 pairs, channel 20.9 turns 32 times and channel 45.03 once."""
    plain = rope_frequencies(128, 1e4, None)
    scaling = YarnRopeScaling(factor=4.0, original_max_position=4096, attention_factor=1.1386)
    slowed = plain / rope_frequencies(128, 1e4, scaling)
    np.testing.assert_allclose(slowed[:21], 1, rtol=1e-5)
    np.testing.assert_allclose(slowed[46:], 4, rtol=1e-5)
    np.testing.assert_allclose(1 / slowed[33], (1 - 13 / 26) + 13 / 26 / 4, rtol=1e-5)
    untruncated = plain / rope_frequencies(128, 1e4, dataclasses.replace(scaling, truncates=False))
    assert 1 < untruncated[21] < slowed[21]
