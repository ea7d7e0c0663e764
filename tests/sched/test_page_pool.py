import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.sched.page_pool import PagePool


def conserved(pool: PagePool, held: list[np.ndarray]) -> bool:
    """Every page is free or held, once."""
    pages = np.concatenate([pool.free_pages, *held])
    owners = np.bincount(np.concatenate([np.zeros(0, np.int32), *held]), minlength=pool.num_pages + 1)
    return sorted(pages.tolist()) == list(range(1, pool.num_pages + 1)) and (owners == pool.owners).all()


def free(pool: PagePool, pages: np.ndarray) -> None:
    pool.give_back(pool.release(pages))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(num_pages=st.integers(1, 20), calls=st.lists(st.integers(-5, 8), max_size=40))
def test_pages_are_conserved_and_the_null_page_never_given(num_pages: int, calls: list[int]) -> None:
    pool, held = PagePool(num_pages), []
    for call in calls:
        if call >= 0:
            held.append(pool.take(min(call, pool.num_free)))
            assert NULL_PAGE not in held[-1]
        elif held:
            free(pool, held.pop(call % len(held)))
        assert conserved(pool, held)
    for pages in held:
        free(pool, pages)
    assert pool.num_free == num_pages


def test_a_page_that_is_not_given_back_is_missed() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    free(pool, pages[:2])
    assert not conserved(pool, [])
    assert conserved(pool, [pages[2:]])


def test_pages_are_given_in_an_order_that_the_calls_alone_decide() -> None:
    def pages_of(pool: PagePool) -> list[int]:
        first, second = pool.take(2), pool.take(3)
        free(pool, first)
        return [*first.tolist(), *second.tolist(), *pool.take(4).tolist()]

    assert pages_of(PagePool(9)) == pages_of(PagePool(9))


def test_more_pages_than_are_free_and_pages_that_are_free_are_refused() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="2 pages wanted, 1 free"):
        pool.take(2)
    free(pool, pages)
    with pytest.raises(AssertionError, match="released but has no owner"):
        pool.release(pages[:1])
    assert pool.num_free == 3


def test_a_page_is_unowned_once_all_its_owners_released_it() -> None:
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(1)
    both = np.concatenate((first, second))
    assert pool.share(both).tolist() == []
    assert pool.release(np.concatenate((both, first))).tolist() == first.tolist()
    assert pool.num_free == 2  # not before it is given back
    assert pool.share(first).tolist() == first.tolist()


def test_pages_of_several_owners_are_released_as_if_one_after_the_other() -> None:
    pool = PagePool(6)
    pages = pool.take(4)
    pool.share(pages[:2])
    listed = np.concatenate((pages[[0, 1, 2]], pages[[3, 1, 0]]))
    assert pool.release(listed).tolist() == pages[[2, 3, 1, 0]].tolist()
    assert not pool.owners.any()


def test_what_was_handed_out_does_not_change_with_the_pool() -> None:
    pool = PagePool(4)
    pages = pool.take(4)
    before = pages.copy()
    free(pool, pages[::-1])
    pool.take(2)
    assert (pages == before).all()
