"""Random steps over random caches, as attention takes them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from albireo_jax.ops.kv_cache import KvCache, encode, new_cache


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a step; contexts take up to `columns` pages."""

    tokens: int
    rows: int
    columns: int = 51
    page_size: int = 4
    heads: int = 2
    group: int = 2
    head_dim: int = 8
    layers: int = 2
    dtype: str = "float32"

    @property
    def is_quantised(self):
        return self.dtype in ("int8", "uint8")


def random_batch(seed, shape, *, counts):
    """A step of rows with `counts` queries and random contexts; what no row owns is read as NaN."""
    rng = np.random.default_rng(seed)
    counts = np.array([*counts, *[0] * (shape.rows - len(counts))])
    longest = shape.columns * shape.page_size
    contexts = np.array([int(rng.integers(count, longest + 1)) if count else 0 for count in counts])
    num_pages = shape.rows * shape.columns + 1
    table_RM = 1 + rng.permutation(num_pages - 1).reshape(shape.rows, shape.columns)
    cache_shape = (shape.layers, num_pages, shape.page_size, shape.heads, shape.head_dim)
    k_LPSNK, v_LPSNK = np.full(cache_shape, np.nan), np.full(cache_shape, np.nan)
    for row, context in enumerate(contexts):
        entry_C = np.arange(context)
        where = (
            slice(None),
            table_RM[row, entry_C // shape.page_size],
            entry_C % shape.page_size,
        )
        k_LPSNK[where] = rng.standard_normal(k_LPSNK[where].shape)
        v_LPSNK[where] = rng.standard_normal(v_LPSNK[where].shape)
    q_TNGK = rng.standard_normal((shape.tokens, shape.heads, shape.group, shape.head_dim))
    q_dtype = jnp.float32 if shape.is_quantised else shape.dtype
    arrays = jnp.asarray(q_TNGK, q_dtype), make_cache(k_LPSNK, v_LPSNK, shape.dtype)
    rows = {
        "row_start_R1": jnp.asarray([0, *np.cumsum(counts)], jnp.int32),
        "context_R": jnp.asarray(contexts, jnp.int32),
        "page_table_RM": jnp.asarray(table_RM, jnp.int32),
    }
    return arrays, rows


def make_cache(k_LPSNK, v_LPSNK, dtype):
    """A cache that reads as these arrays, rounded to its dtype."""
    k, v = (
        encode(jnp.asarray(x.reshape(-1, *x.shape[-2:]), jnp.float32), jnp.dtype(dtype))
        for x in (k_LPSNK, v_LPSNK)
    )
    shapes = jax.eval_shape(lambda: new_cache(k_LPSNK.shape, jnp.dtype(dtype)))
    if k.scale_TN is not None:  # codes are never NaNs
        has_nan_TN = np.isnan(k_LPSNK).any(axis=-1).reshape(k.scale_TN.shape)
        k, v = (each._replace(scale_TN=jnp.where(has_nan_TN, jnp.nan, each.scale_TN)) for each in (k, v))
    coded = KvCache(k.x_TNK, v.x_TNK, k.scale_TN, v.scale_TN)
    return jax.tree.map(lambda array, like: array.reshape(like.shape), coded, shapes)


def random_counts(seed, shape):
    """Queries per row: none, one, or a chunk, some rows and tokens being left for padding."""
    rng = np.random.default_rng(seed)
    counts, room = [], shape.tokens
    for _ in range(int(rng.integers(1, shape.rows + 1))):
        count = int(rng.choice([0, 1, rng.integers(0, room + 1)]))
        counts.append(min(count, room))
        room -= counts[-1]
    return counts
