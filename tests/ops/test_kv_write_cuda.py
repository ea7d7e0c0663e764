"""The kernel between projections and attention, run on the CPU, against the operations of XLA one by one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.nn.decoder import Projected, queries_keys_values
from albireo_jax.nn.layers import Rotation
from albireo_jax.ops.kv_cache import KvCache, decode, encode, new_cache
from albireo_jax.ops.kv_write import TokenPages
from albireo_jax.ops.kv_write_cuda import HeadParams, rotate_and_write
from tests.labs.cuda_lab import Order, launch_on_cpu, needs_compiler

TOKENS, LAYERS, PAGES, PAGE_SIZE = 7, 2, 9, 4
LATE, EARLY = Order(0, is_eager=False), Order(1, is_eager=True)


def projections(seed, *, heads=2, group=3, head_dim=64, has_bias=False, has_norms=False, scale=1.0):
    """Random projections in bfloat16, rotated to random positions."""
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.bfloat16)

    angle_TH = jnp.asarray(rng.uniform(0, 7, (TOKENS, head_dim // 2)), jnp.float32)
    return Projected(
        qkv_TNXK=random(TOKENS, heads, group + 2, head_dim),
        bias_NXK=random(heads, group + 2, head_dim) if has_bias else None,
        q_norm_K=random(head_dim) if has_norms else None,
        k_norm_K=random(head_dim) if has_norms else None,
        eps=1e-5,
        by=Rotation(jnp.cos(angle_TH), jnp.sin(angle_TH)),
    )


def random_cache(projected, dtype):
    """A cache whose pages hold other bits everywhere."""
    _, heads, _, head_dim = projected.qkv_TNXK.shape
    rng = np.random.default_rng(9)
    zeros = new_cache((LAYERS, PAGES, PAGE_SIZE, heads, head_dim), jnp.dtype(dtype))
    return jax.tree.map(lambda array: jnp.asarray(rng.integers(1, 99, array.shape), array.dtype), zeros)


def token_places(seed):
    """Pages and offsets of tokens, no two at one place; the last two are padding."""
    places = PAGE_SIZE + np.random.default_rng(seed).permutation((PAGES - 1) * PAGE_SIZE)[:TOKENS]
    page_T, offset_T = np.divmod(places, PAGE_SIZE)
    page_T[-2:] = NULL_PAGE
    return TokenPages(jnp.asarray(page_T, jnp.int32), jnp.asarray(offset_T, jnp.int32))


def both(projected, dtype, *, order=LATE, edits=(), seed=0):
    """Queries and caches of the operations and of the kernel, the null page left out."""
    cache, pages = random_cache(projected, dtype), token_places(seed)
    rotated = rotate_and_write(
        cache,
        qkv_TNXK=projected.qkv_TNXK,
        params=HeadParams(projected.bias_NXK, projected.q_norm_K, projected.k_norm_K, projected.eps),
        cos_TH=projected.by.cos_TH,
        sin_TH=projected.by.sin_TH,
        place_T=pages.page_T * PAGE_SIZE + pages.offset_T,
        layer=1,
        launch=launch_on_cpu(order, edits=edits),
    )
    q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
    (k, k_scale), (v, v_scale) = (exact_codes(np.asarray(x, np.float32), dtype) for x in (k_TNK, v_TNK))
    at = (1, pages.page_T, pages.offset_T)
    want = jax.tree.map(lambda held, new: held.at[at].set(new), cache, KvCache(k, v, k_scale, v_scale))
    return [(q_TNGK, *map(owned, want)), (rotated.q_TNGK, *map(owned, rotated.cache))]


def exact_codes(x_TNK, dtype):
    """`encode`, but that its quotients are those of IEEE 754: XLA's on a CPU may differ in the last bit."""
    if dtype == "bfloat16":
        return x_TNK.astype(jnp.bfloat16), None
    kind, largest = {"int8": (np.int8, 127), "uint8": (ml_dtypes.float8_e4m3fn, 448)}[dtype]
    peak_TN = np.maximum(np.abs(x_TNK).max(axis=-1), np.float32(2.0**-100))
    bits_TN = (peak_TN * (np.float32(1) / np.float32(largest))).view(np.int32)
    scale_TN = np.where(np.isnan(peak_TN), np.int32(0x7FC00000), (bits_TN + 0xFFFF) & ~0xFFFF).view(
        np.float32
    )
    with np.errstate(invalid="ignore"):
        code_TNK = x_TNK / scale_TN[..., None]
        code_TNK = (np.rint(code_TNK) if dtype == "int8" else code_TNK).astype(kind)
    if dtype == "int8":
        code_TNK ^= np.int8(-128)
    return code_TNK.view(dtype), scale_TN.astype(jnp.bfloat16)


def owned(array):
    return None if array is None else array[:, NULL_PAGE + 1 :]


def bits(array):
    return np.asarray(array).view({1: np.uint8, 2: np.uint16}[array.dtype.itemsize])


def check(projected, dtype, **how):
    for want, got in zip(*both(projected, dtype, **how), strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            np.testing.assert_array_equal(bits(got), bits(want))


SHAPES = [
    {"head_dim": 128, "group": 4},
    {"head_dim": 64, "group": 3, "heads": 3, "has_bias": True},
    {"head_dim": 80, "group": 1},
    {"head_dim": 96, "group": 2, "heads": 1, "scale": 30.0},
    {"head_dim": 256, "group": 2, "has_bias": True},
    {"head_dim": 8, "group": 20, "heads": 1, "scale": 1e-3},
]


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_the_bits_of_the_operations(shape, dtype):
    check(projections(0, **shape), dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_norms_differ_by_the_order_of_their_sums_at_most(head_dim, dtype):
    """Numbers in bfloat16 are equal but for the few that lie beside a border between two."""
    projected = projections(1, head_dim=head_dim, has_bias=True, has_norms=True)
    want, got = both(projected, dtype)
    steps = np.abs(ordered(bits(got[0])) - ordered(bits(want[0])))
    assert steps.max() <= 2  # one of the norm, and one of the rotation that follows
    assert (steps > 0).mean() < 0.01
    for code, other in zip(got[1:3], want[1:3], strict=True):
        assert (bits(code) != bits(other)).mean() < 0.01


def ordered(bits):
    """Bits of bfloat16 as integers in the order of the numbers."""
    signed = bits.astype(np.int64)
    return np.where(signed & 0x8000, 0x8000 - signed, signed)


@needs_compiler
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_every_quotient_gets_the_code_of_the_operations(dtype):
    """Vectors of all exponents, each with its own peak, and those that are zero or nearly."""
    rng = np.random.default_rng(2)
    projected = projections(2, head_dim=256, group=1, heads=4)
    shape = projected.qkv_TNXK.shape
    sizes = 2.0 ** rng.uniform(-30, 8, (*shape[:-1], 1)) * 2.0 ** rng.uniform(-14, 0, shape)
    sizes[0, 0], sizes[1, 1] = 0.0, 2.0**-120
    numbers = jnp.asarray(sizes * rng.choice([-1, 1], shape), jnp.bfloat16)
    check(projected._replace(qkv_TNXK=numbers), dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_exact_codes_are_those_of_encode_but_for_quotients_beside_a_border(dtype):
    x_TNK = np.random.default_rng(7).standard_normal((64, 3, 128)).astype(np.float32)
    coded, (code_TNK, scale_TN) = encode(jnp.asarray(x_TNK), jnp.dtype(dtype)), exact_codes(x_TNK, dtype)
    assert (np.asarray(coded.x_TNK) != code_TNK).mean() < 1e-3
    np.testing.assert_array_equal(np.asarray(coded.scale_TN, np.float32), scale_TN.astype(np.float32))


@needs_compiler
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_read_back_as_not_finite(dtype, wrong):
    projected = projections(3)
    numbers = projected.qkv_TNXK.at[2, 1, -2:, 5].set(wrong)
    _, (_, k, v, k_scale, v_scale) = both(projected._replace(qkv_TNXK=numbers), dtype)
    page, offset = (int(each[2]) for each in token_places(0))
    for codes, scales in ((k, k_scale), (v, v_scale)):
        read = np.asarray(decode(codes) * scales.astype(jnp.float32)[..., None])
        assert not np.isfinite(read[1, page - 1, offset, 1]).all()
        assert np.isfinite(read).all(axis=-1).sum() == scales.size - 1


@needs_compiler
def test_the_order_of_threads_changes_nothing():
    projected = projections(4, has_bias=True, has_norms=True)
    late, early = (both(projected, "int8", order=order)[1] for order in (LATE, EARLY))
    for one, other in zip(late, early, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


FAULTS = [
    ("is_query ? q_norm : k_norm", "q_norm"),
    ("if (!is_value) rotate", "rotate"),
    ("mul_rn(first, c), mul_rn(second, s)", "mul_rn(first, s), mul_rn(second, c)"),
    ("x.first[i] = round_bf16(add_rn", "x.first[i] = (add_rn"),
    ("(u64)*layer * NUM_PAGES", "(u64)0 * NUM_PAGES"),
    ("head * VECTORS + nth", "nth"),
    ("(bits + 0xffff) >> 16", "bits >> 16"),
    ("(int)rintf(x) + 128", "(int)x + 128"),
    ("(int)rintf(x) + 128", "(int)rintf(x)"),
    ("(is_value ? v_scale : k_scale) + cached", "k_scale + cached"),
    ("places[token]", "places[0]"),
]


@needs_compiler
@pytest.mark.parametrize(("right", "wrong"), FAULTS, ids=[right for right, _ in FAULTS])
def test_a_fault_in_the_kernel_is_seen(right, wrong):
    projected = projections(5, has_bias=True, has_norms="norm" in right)

    def worst(edits):
        pairs = zip(*both(projected, "int8", edits=edits), strict=True)
        return max((bits(got) != bits(want)).mean() for want, got in pairs)

    assert worst(()) < 0.01
    assert worst(((right, wrong),)) > 0.02
