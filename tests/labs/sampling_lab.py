"""A sampler of one row that sorts, in NumPy, and rows of every kind to hold the real one against it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from albireo_jax.core.token_sampling import MAX_SEED
from albireo_jax.sampling.filters import SamplerParams
from albireo_jax.sampling.noise import Words, gumbel

INF = np.float32(np.inf)
MAX_WEIGHT = np.float32(2**28 - 2**4)
_MIN_EXPECTED = 5


class Row(NamedTuple):
    """The parameters of one row, on the host."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def params_of(rows):
    """The rows as arrays."""
    seeds = [(row.seed >> 32, row.seed & 0xFFFFFFFF) for row in rows]
    return SamplerParams(
        temperature_R=jnp.asarray([row.temperature for row in rows], jnp.float32),
        top_k_R=jnp.asarray([row.top_k for row in rows], jnp.int32),
        top_p_R=jnp.asarray([row.top_p for row in rows], jnp.float32),
        min_p_R=jnp.asarray([row.min_p for row in rows], jnp.float32),
        seed_R2=jnp.asarray(np.array(seeds, np.uint32).reshape(-1, 2)),
        position_R=jnp.asarray([row.position for row in rows], jnp.int32),
    )


def noise_of(rows, vocab):
    """Gumbel noise of all tokens, [R, V]."""
    params = params_of(rows)
    return np.asarray(_noise(params.seed_R2, params.position_R, vocab=vocab))


@partial(jax.jit, static_argnames="vocab")
def _noise(seed_R2, position_R, *, vocab):
    key = Words(seed_R2[:, :1], seed_R2[:, 1:])
    id_1V = jnp.arange(vocab, dtype=jnp.uint32)[None, :]
    return gumbel(key, Words(position_R.astype(jnp.uint32)[:, None], id_1V))


def allowed(logits, row):
    """Scaled logits, and which tokens the filters keep: sorted, no bisection. For rows that draw."""
    scaled = (logits - logits.max()) / np.float32(row.temperature)
    weight = np.rint(np.exp(scaled.astype(np.float64)).astype(np.float32) * MAX_WEIGHT).astype(np.int64)
    keep = logits > -INF
    if 0 < row.top_k < len(logits):
        keep &= logits >= np.sort(logits)[-row.top_k]
    if row.top_p < 1:
        falling = np.argsort(-logits, stable=True)
        falling = falling[keep[falling]]
        share = np.float32(row.top_p) * np.float32(weight[falling].sum())
        reached = np.cumsum(weight[falling]).astype(np.float32) >= max(share, np.float32(1))
        keep &= logits >= logits[falling[np.argmax(reached)]]
    if row.min_p > 0:
        keep &= scaled >= np.log(np.float32(row.min_p))
    return scaled, keep


def oracle(logits, row, noise):
    """The id that `sample` must give for one row."""
    if row.temperature == 0:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):
        scaled, keep = allowed(logits, row)
    return int(np.argmax(np.where(keep, scaled + noise, -INF)))


def random_row(rng, vocab):
    """Parameters of every kind, each often neutral."""
    return Row(
        temperature=float(rng.choice([0.0, 1e-30, 1e-5, 0.2, 0.7, 1.0, 1.0, 1.5, 100.0])),
        top_k=int(rng.choice([0, 0, 0, 1, 2, 5, 50, vocab - 1, vocab, vocab + 9])),
        top_p=float(rng.choice([1.0, 1.0, 1.0, 0.999999, 0.95, 0.9, 0.5, 0.1, 1e-9])),
        min_p=float(rng.choice([0.0, 0.0, 0.0, 1e-7, 0.02, 0.3, 1.0])),
        seed=int(rng.integers(0, MAX_SEED, endpoint=True)),
        position=int(rng.integers(0, 2**31 - 1)) if rng.random() < 0.1 else int(rng.integers(0, 5000)),
    )


def random_logits(rng, vocab):
    """Logits of every kind: smooth, peaked, tied, coarse, extreme, mostly forbidden, constant."""
    logits = rng.normal(size=vocab) * rng.choice([0.1, 1.0, 3.0, 10.0])
    kind = rng.integers(0, 7)
    if kind == 1:
        logits = np.round(logits)
    elif kind == 2:
        logits = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)
    elif kind == 3:
        logits = logits * 10.0 ** rng.integers(3, 38)
    elif kind == 4:
        logits[rng.random(vocab) < 0.95] = -np.inf
    elif kind == 5:
        logits = np.full(vocab, rng.choice([0.0, -7.5, 3e38, -3e38]))
        logits[rng.integers(0, vocab)] += rng.choice([0.0, 1.0])
    elif kind == 6:
        logits = -2.0 * np.log(1 + rng.permutation(vocab)) + logits * 0.01
    logits = np.clip(logits, -3e38, 3e38, where=np.isfinite(logits), out=logits)
    if not np.isfinite(logits).sum() > 8:
        logits[:9] = 0.0  # so that there is something to choose from
    return logits.astype(np.float32)


def random_batch(seed, rows, vocab):
    """Logits [R, V], and R rows."""
    rng = np.random.default_rng(seed)
    logits = np.stack([random_logits(rng, vocab) for _ in range(rows)])
    return logits, [random_row(rng, vocab) for _ in range(rows)]


def p_value(ids, probability):
    """How likely draws from the distribution are to be as far from it as these: Pearson's chi-squared test.

    Rare tokens share bins, in which at least 5 draws are expected. A token of no probability has p-value 0.
    """
    count = np.bincount(ids, minlength=len(probability))
    if count[probability == 0].any():
        return 0.0
    falling = np.argsort(-probability)[: np.count_nonzero(probability)]
    expected = probability[falling] * len(ids)
    # A bin is full once it expects enough; the rest at the end joins the last full one.
    bins, filled = np.zeros(len(falling), np.int64), 0.0
    for i, value in enumerate(expected[:-1]):
        filled += value
        is_full = filled >= _MIN_EXPECTED
        bins[i + 1] = bins[i] + is_full
        filled = 0.0 if is_full else filled
    if filled + expected[-1] < _MIN_EXPECTED:
        bins[bins == bins[-1]] -= 1
    return scipy.stats.chisquare(np.bincount(bins, count[falling]), np.bincount(bins, expected)).pvalue
