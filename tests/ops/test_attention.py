import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.attention_ref import reference_attention


def make(rng, *, counts, contexts, tokens, rows, S=4, N=2, G=2, K=8, L=2, dtype=jnp.float32, width=None):
    counts = np.array(counts + [0] * (rows - len(counts)), np.int32)
    contexts = np.array(contexts + [0] * (rows - len(contexts)), np.int32)
    need = [-(-int(c) // S) for c in contexts]
    width = width or max(need) + 3
    total = sum(need)
    order = rng.permutation(total) + 1
    P = total + 4
    table = np.zeros((rows, width), np.int32)
    k = np.full((L, P, S, N, K), np.nan, np.float32)
    v = np.full((L, P, S, N, K), np.nan, np.float32)
    at = 0
    for r, c in enumerate(contexts):
        for j in range(need[r]):
            page = order[at]
            at += 1
            table[r, j] = page
            n = min(S, c - j * S)
            k[:, page, :n] = rng.standard_normal((L, n, N, K))
            v[:, page, :n] = rng.standard_normal((L, n, N, K))
    q = rng.standard_normal((tokens, N, G, K)).astype(np.float32)
    return (
        (jnp.array(q, dtype), jnp.array(k, dtype), jnp.array(v, dtype)),
        {
            "row_start_R1": jnp.array(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
            "context_R": jnp.array(contexts),
            "page_table_RM": jnp.array(table),
        },
    )


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("seed", range(4))
def test_equals_reference(seed, window):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 6))
    counts = [int(c) for c in rng.integers(0, 40, rows)]
    contexts = [c + int(rng.integers(0, 150)) if c else 0 for c in counts]
    arrays, meta = make(rng, counts=counts, contexts=contexts, tokens=sum(counts) + 7, rows=rows + 2)
    got = jax.jit(lambda *a: paged_attention(*a, layer=1, scale=0.3, sliding_window=window, **meta))(*arrays)
    want = reference_attention(*arrays, layer=1, scale=0.3, sliding_window=window, **meta)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_decode():
    rng = np.random.default_rng(0)
    arrays, meta = make(rng, counts=[1, 1, 0, 1], contexts=[9, 200, 0, 65], tokens=6, rows=6)
    got = paged_attention(*arrays, layer=1, scale=0.3, sliding_window=None, **meta)
    want = reference_attention(*arrays, layer=1, scale=0.3, sliding_window=None, **meta)
    np.testing.assert_allclose(got, want, atol=2e-6)
