import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from albireo_jax.sampling.noise import Words, gumbel, threefry2x32


def words(first, second):
    return Words(jnp.uint32(first), jnp.uint32(second))


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [  # Random123's kat_vectors
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        (13, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        (13, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
        (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (20, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        (20, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(rounds, counter, key, expected):
    got = threefry2x32(words(*key), words(*counter), rounds=rounds)
    assert (int(got.first), int(got.second)) == expected


def test_with_20_rounds_it_is_the_generator_of_jax():
    key = jax.random.key_data(jax.random.key(12345))
    got = threefry2x32(
        Words(key[0], key[1]),
        Words(jnp.zeros(1000, jnp.uint32), jnp.arange(1000, dtype=jnp.uint32)),
        rounds=20,
    )
    with jax.threefry_partitionable(True):
        want = jax.random.bits(jax.random.key(12345), (1000,), jnp.uint32)
    np.testing.assert_array_equal(got.first ^ got.second, want)


def test_noise_is_gumbel_over_tokens_positions_and_seeds():
    key = Words(jnp.arange(3, dtype=jnp.uint32)[:, None, None], jnp.uint32(7))
    position = jnp.arange(40, dtype=jnp.uint32)[None, :, None]
    noise = np.asarray(
        jax.jit(gumbel)(key, Words(position, jnp.arange(1000, dtype=jnp.uint32)[None, None, :]))
    )
    assert np.isfinite(noise).all()
    for sample in (
        noise.ravel(),
        noise[:, :, 5].ravel(),
        noise[:, 7].ravel(),
        noise.max(axis=2).ravel() - np.log(1000),
    ):
        assert scipy.stats.kstest(sample, "gumbel_r").pvalue > 1e-3
    for axis in range(3):
        neighbours = (
            np.take(noise, range(noise.shape[axis] - 1), axis),
            np.take(noise, range(1, noise.shape[axis]), axis),
        )
        assert abs(np.corrcoef(neighbours[0].ravel(), neighbours[1].ravel())[0, 1]) < 0.02


def test_large_noise_keeps_all_its_digits():
    key, counter = words(1, 2), Words(jnp.uint32(0), jnp.arange(2**20, dtype=jnp.uint32))
    bits = np.asarray(jax.jit(threefry2x32)(key, counter).first >> 1, np.float64)
    exact = -np.log(-np.log1p(-(bits + 0.5) / 2**31))
    noise = np.asarray(jax.jit(gumbel)(key, counter))
    assert exact.max() > 13
    np.testing.assert_allclose(noise[exact > 0], exact[exact > 0], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(noise, exact, atol=5e-3)


def test_any_slice_of_the_vocabulary_has_the_noise_of_the_whole():
    key = words(3, 4)
    whole = jax.jit(gumbel)(key, Words(jnp.uint32(9), jnp.arange(1000, dtype=jnp.uint32)))
    for start, stop in ((0, 1), (17, 400), (399, 1000)):
        part = jax.jit(gumbel)(key, Words(jnp.uint32(9), jnp.arange(start, stop, dtype=jnp.uint32)))
        np.testing.assert_array_equal(part, whole[start:stop])
