"""Pages of two tiers under random use: none is lost, prefixes leave from their ends, and copies add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.sched.prefix import Digest, Node, extend_digests, root_digest
from albireo_jax.sched.tiers import PageTiers

PAGE_SIZE = 2


def digests_of(text: tuple[int, ...]) -> list[Digest]:
    digests: list[Digest] = []
    extend_digests(digests, root_digest(""), np.array(text, np.int32), page_size=PAGE_SIZE)
    return digests


class Model:
    """Both tiers as what is written in them, told by the copies; and who owns what."""

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self.tiers = PageTiers(num_pages, num_host_pages=num_host_pages)
        self.device: dict[int, bytes] = {}
        self.host: dict[int, bytes] = {}
        self.held: list[np.ndarray] = []

    def settle(self) -> None:
        """What a step does with its copies."""
        copies = self.tiers.copies()
        self.host |= {host: self.device[page] for page, host in copies.to_host}
        self.device |= {page: self.host[host] for host, page in copies.to_device}
        self.tiers.check_invariants(np.concatenate([np.zeros(0, np.int32), *self.held]))

    def run(self, text: tuple[int, ...]) -> int:
        """A request that holds `text`, as far as there are pages; gives the pages that it found."""
        digests = digests_of(text)
        chain = self.tiers.find(digests)
        missing = [node for node in chain if node.page == NULL_PAGE]
        wanted = len(digests) - len(chain)
        if len(missing) + wanted > self.tiers.num_available - self.tiers.num_idle(chain):
            return 0
        self.tiers.restore(chain)
        found = np.array([node.page for node in chain], np.int32)
        self.held.append(found)
        self.settle()
        assert [self.device[page] for page in found.tolist()] == digests[: len(chain)]
        new = self.tiers.take(wanted)
        self.held[-1] = np.concatenate((found, new))
        self.settle()
        for place, page in enumerate(new.tolist(), start=len(chain)):
            self.device[page] = digests[place]
            self.tiers.insert(Node(page=page), digests[place], parent=digests[place - 1] if place else None)
        self.settle()
        return len(chain)

    def end(self, index: int) -> None:
        """One of the requests ends."""
        self.tiers.release(self.held.pop(index % len(self.held)))
        self.settle()


texts = st.lists(st.integers(0, 1), max_size=12).map(tuple)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    num_pages=st.integers(1, 9),
    num_host_pages=st.integers(0, 6),
    calls=st.lists(st.one_of(texts, st.integers(0, 9)), max_size=40),
)
def test_what_is_found_is_what_was_written(num_pages: int, num_host_pages: int, calls: list) -> None:
    model = Model(num_pages, num_host_pages)
    for call in calls:
        if isinstance(call, tuple):
            model.run(call)
        elif model.held:
            model.end(call)
    while model.held:
        model.end(0)
    assert model.tiers.num_available == num_pages
    assert model.tiers.stats().in_use == 0
    model.tiers.check_unowned()


def test_a_prefix_moves_to_the_host_from_its_end_and_comes_back() -> None:
    model = Model(num_pages=4, num_host_pages=3)
    assert model.run((0, 0, 1, 1, 0, 1)) == 0
    model.end(0)
    assert model.run((1,) * 6) == 0  # three pages, of which two were idle ones
    stats = model.tiers.stats()
    assert (stats.copied_out, stats.host_in_use, stats.idle, stats.lost) == (2, 2, 1, 0)
    model.end(0)
    assert model.run((0, 0, 1, 1, 0, 1)) == 3
    assert model.tiers.stats().copied_in == 2


def test_without_a_host_the_prefix_used_longest_ago_is_lost() -> None:
    model = Model(num_pages=4, num_host_pages=0)
    for text in ((0, 0, 0, 1), (1, 1, 1, 0), (0, 0, 0, 1)):
        model.run(text)
        model.end(0)
    assert model.run((1, 0)) == 0
    assert model.run((0, 0, 0, 1)) == 2
    assert model.tiers.stats().lost == 1


def test_what_is_computed_again_takes_the_place_of_what_is_on_the_host() -> None:
    tiers = PageTiers(2, num_host_pages=1)
    (digest,) = digests_of((0, 1))
    (page,) = tiers.take(1)
    tiers.insert(Node(page=int(page)), digest, parent=None)
    tiers.release(np.array([page], np.int32))
    both = tiers.take(2)
    tiers.copies()
    assert tiers.stats().host_in_use == 1
    tiers.insert(Node(page=int(both[0])), digest, parent=None)
    tiers.check_invariants(both)
    assert tiers.stats().host_in_use == 0
    assert tiers.find([digest])[0].page == both[0]


def test_pending_pages_are_found_only_if_they_are_still_there() -> None:
    digests = digests_of((0, 1, 2, 3))
    for evicted in (0, 1, 2):
        tiers = PageTiers(2, num_host_pages=4)
        pages = tiers.take(2)
        nodes = [Node(page=int(page)) for page in pages]
        tiers.release(pages, pending=nodes)
        tiers.take(evicted)
        for place, node in enumerate(nodes):
            tiers.insert(node, digests[place], parent=digests[place - 1] if place else None)
        assert len(tiers.find(digests)) == 2 - evicted
        assert tiers.copies().to_host == ()


def test_pages_that_somebody_owns_or_nobody_has_are_missed_when_idle() -> None:
    tiers = PageTiers(3, num_host_pages=0)
    pages = tiers.take(2)
    with pytest.raises(AssertionError, match="a page has an owner"):
        tiers.check_unowned()
    tiers.release(pages)
    tiers.check_unowned()
    tiers._device.take(1)
    tiers._device._owners[:] = 0
    with pytest.raises(AssertionError, match="1 pages are lost"):
        tiers.check_unowned()
