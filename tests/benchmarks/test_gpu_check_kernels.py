"""The GPU check's comparison of a layer's kernels, which run on the CPU here, and with faults in them."""

import pytest

from benchmarks.gpu_check.attention_cases import PAGE_DTYPES
from benchmarks.gpu_check.check_parts import goal_of
from benchmarks.gpu_check.layer_kernels import (
    RotateCase,
    add_share,
    rotate_cases,
    rotate_share,
)
from tests.labs.cuda_lab import Edits, Order, launch_on_cpu, needs_compiler

ORDER = Order(0, is_eager=False)
CASES = list(rotate_cases(small=True))
ROTATE_FAULTS = [
    (CASES[0], ("mul_rn(first, c), mul_rn(second, s)", "mul_rn(first, s), mul_rn(second, c)")),
    (CASES[1], ("(is_value ? v_scale : k_scale) + cached", "k_scale + cached")),
    (CASES[2], ("places[token]", "places[token / 2]")),
    (CASES[3], ("is_query ? q_norm : k_norm", "q_norm")),
    (CASES[4], ("(u64)*layer * NUM_PAGES", "(u64)0 * NUM_PAGES")),
    (CASES[5], ("head * VECTORS + nth", "nth")),
]


def is_right(subject: str, case: str, share: float) -> bool:
    """Whether the goal of this figure is met."""
    goal = goal_of("sampling", (subject, case, "share of equal bytes"))
    assert goal is not None
    assert goal.everywhere
    return goal.is_met(share)


def rotates(case: RotateCase, edits: Edits = ()) -> bool:
    share = rotate_share(case, launch=launch_on_cpu(ORDER, edits=edits))
    return is_right("rotate and write", case.name, share)


def normalises(edits: Edits = ()) -> bool:
    share = add_share(64, launch=launch_on_cpu(ORDER, edits=edits))
    return is_right("add and normalise", "norms of 64 channels", share)


def test_every_precision_of_pages_is_written_with_norms_and_without() -> None:
    assert {(case.kv_dtype, case.has_norms) for case in CASES} == {
        (kv_dtype, has_norms) for kv_dtype in PAGE_DTYPES for has_norms in (False, True)
    }
    assert goal_of("sampling", ("rotate and write", CASES[0].name, "share of equal bytes")) == goal_of(
        "sampling", ("KV write", "int8", "share of equal bytes")
    )


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_that_writes_pages_is_right(case: RotateCase) -> None:
    assert rotates(case)


@needs_compiler
@pytest.mark.parametrize(("case", "fault"), ROTATE_FAULTS, ids=lambda each: str(each)[:40])
def test_a_fault_in_the_kernel_that_writes_pages_misses_the_goal(
    case: RotateCase, fault: tuple[str, str]
) -> None:
    assert not rotates(case, (fault,))


@needs_compiler
@pytest.mark.parametrize(
    "fault",
    [
        ("sums[i] = read_channels((const u16 *)&rounded)", "sums[i] = more"),
        ("1.0f / WIDTH", "1.0f / THREADS"),
        ("*(uint4 *)(x + row + channel) = rounded", "*(uint4 *)(x + channel) = rounded"),
    ],
    ids=lambda each: str(each)[:30],
)
def test_the_kernel_of_residuals_is_right_and_a_fault_in_it_misses_the_goal(fault: tuple[str, str]) -> None:
    assert normalises()
    assert not normalises((fault,))
