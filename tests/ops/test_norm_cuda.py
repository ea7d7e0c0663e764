"""The kernel of a residual and its norm, run on the CPU, against the operations of XLA one by one."""

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.nn.layers import rms_norm
from albireo_jax.ops.norm_cuda import add_and_normalise, is_possible, norm_kernel
from tests.labs.cuda_lab import Order, launch_on_cpu, needs_compiler

EPS = 1e-3
LATE, EARLY = Order(0, is_eager=False), Order(1, is_eager=True)


def both(width, *, order=LATE, edits=()):
    """What the operations and the kernel give, rows of very different sizes among them."""
    rng = np.random.default_rng(width)
    sizes = np.array([[1.0], [1e-3], [100.0], [0.0]])
    x_TD, added_TD = (jnp.asarray(sizes * rng.standard_normal((4, width)), jnp.bfloat16) for _ in range(2))
    weight_D = jnp.asarray(rng.standard_normal(width), jnp.bfloat16)
    got = add_and_normalise(x_TD, added_TD, weight_D, eps=EPS, launch=launch_on_cpu(order, edits=edits))
    sum_TD = x_TD + added_TD
    return (sum_TD, rms_norm(sum_TD, weight_D, EPS)), got


def steps(one, other):
    """How many numbers of bfloat16 lie between two, element by element."""
    ordered = [np.asarray(each).view(np.uint16).astype(np.int64) for each in (one, other)]
    one, other = (np.where(each & 0x8000, 0x8000 - each, each) for each in ordered)
    return np.abs(one - other)


def check(width, **how):
    want, got = both(width, **how)
    assert steps(want[0], got.x_TD).max() == 0
    assert steps(want[1], got.normed_TD).max() <= 1
    assert (steps(want[1], got.normed_TD) > 0).mean() < 0.01


@needs_compiler
@pytest.mark.parametrize("width", [8, 576, 4096, 5120, 8192])
def test_gives_the_sum_exactly_and_the_norm_but_for_the_order_of_its_sum(width):
    check(width)


@pytest.mark.parametrize(("width", "warps"), [(8, 1), (4096, 8), (5120, 10), (8192, 16), (65536, 32)])
def test_a_thread_takes_sixteen_channels_while_a_block_has_threads(width, warps):
    assert norm_kernel(width, eps=EPS).warps == warps


@needs_compiler
def test_the_order_of_threads_changes_nothing():
    late, early = (both(4096, order=order)[1] for order in (LATE, EARLY))
    np.testing.assert_array_equal(np.asarray(late.normed_TD), np.asarray(early.normed_TD))


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sums[i] = read_channels((const u16 *)&rounded)", "sums[i] = more"),
        ("  __syncthreads();\n", ""),
        ("1.0f / WIDTH", "1.0f / THREADS"),
        ("warp < WARPS", "warp < WARPS - 1"),
        ("(u64)blockIdx.x * WIDTH", "0"),
        ("read_channels(weight + channel)", "read_channels(weight)"),
        ("i * THREADS) * 8", "i) * 8"),
    ],
    ids=lambda text: text[:30],
)
def test_a_fault_in_the_kernel_is_seen(right, wrong):
    with pytest.raises(AssertionError):
        check(4096, edits=((right, wrong),))


def test_rows_must_be_read_sixteen_bytes_at_a_time():
    assert is_possible(4096)
    assert not is_possible(4092)
