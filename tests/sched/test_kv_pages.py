"""Pages of two tiers under random use: none is lost, prefixes leave from their ends, and copies add up."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.sched.eviction import IdlePages
from albireo_jax.sched.kv_pages import KvPages
from albireo_jax.sched.prefix_tree import Digest, Node, extend_digests, root_digest

PAGE_SIZE = 2


def digests_of(text: tuple[int, ...]) -> list[Digest]:
    digests: list[Digest] = []
    extend_digests(digests, root_digest(""), np.array(text, np.int32), page_size=PAGE_SIZE)
    return digests


class ScannedPages(IdlePages):
    """Idle pages of which the next to evict is looked for among all of them as well."""

    def pop(self) -> Node:
        nodes = self.nodes()
        leaves = [node for node in nodes if not any(child.page for child in node.children.values())]
        expected = (leaves or nodes)[0]
        assert super().pop() is expected
        return expected


class Model:
    """Both tiers as what is written in them, told by the copies; and who owns what."""

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self.tiers = KvPages(num_pages, num_host_pages=num_host_pages)
        self.tiers._idle = ScannedPages()
        self.device: dict[int, bytes] = {}
        self.host: dict[int, bytes] = {}
        self.held: list[np.ndarray] = []

    def settle(self) -> None:
        """Make the copies of one step."""
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
        self.compute(digests, first=len(chain))
        return len(chain)

    def run_beside(self, text: tuple[int, ...]) -> None:
        """A request that computes all of `text`, as one does whose like is computed in the same step."""
        digests = digests_of(text)
        if len(digests) <= self.tiers.num_available:
            self.held.append(np.zeros(0, np.int32))
            self.compute(digests, first=0)

    def compute(self, digests: list[Digest], *, first: int) -> None:
        """The last request has the pages from place `first` on computed."""
        new = self.tiers.take(len(digests) - first)
        self.held[-1] = np.concatenate((self.held[-1], new))
        self.settle()
        for place, page in enumerate(new.tolist(), start=first):
            self.device[page] = digests[place]
            self.tiers.insert(Node(page=page), digests[place], parent=digests[place - 1] if place else None)
        self.settle()

    def end(self, index: int) -> None:
        """One of the requests ends."""
        self.tiers.release(self.held.pop(index % len(self.held)))
        self.settle()


texts = st.lists(st.integers(0, 1), max_size=12).map(tuple)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    num_pages=st.integers(1, 9),
    num_host_pages=st.integers(0, 6),
    calls=st.lists(st.one_of(texts, texts.map(list), st.integers(0, 9)), max_size=40),
)
def test_what_is_found_is_what_was_written(num_pages: int, num_host_pages: int, calls: list) -> None:
    model = Model(num_pages, num_host_pages)
    for call in calls:
        if isinstance(call, tuple):
            model.run(call)
        elif isinstance(call, list):
            model.run_beside(tuple(call))
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
    tiers = KvPages(2, num_host_pages=1)
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
        tiers = KvPages(2, num_host_pages=4)
        pages = tiers.take(2)
        nodes = [Node(page=int(page)) for page in pages]
        tiers.release(pages, pending=nodes)
        tiers.take(evicted)
        for place, node in enumerate(nodes):
            tiers.insert(node, digests[place], parent=digests[place - 1] if place else None)
        assert len(tiers.find(digests)) == 2 - evicted
        assert tiers.copies().to_host == ()


def test_pages_that_somebody_owns_or_nobody_has_are_missed_when_idle() -> None:
    tiers = KvPages(3, num_host_pages=0)
    pages = tiers.take(2)
    with pytest.raises(AssertionError, match="a page has an owner"):
        tiers.check_unowned()
    tiers.release(pages)
    tiers.check_unowned()
    tiers._device.take(1)
    tiers._device._owners[:] = 0
    with pytest.raises(AssertionError, match="1 pages are lost"):
        tiers.check_unowned()


def test_a_page_whose_last_page_behind_it_left_is_evicted_in_its_turn() -> None:
    """One request's chain is idle, and the only page behind it is another's, which had computed the same."""
    model = Model(num_pages=7, num_host_pages=0)
    model.run((0, 0, 0, 0))
    model.run_beside((0, 0, 0, 0, 1, 1))  # its third page is behind the second of the first
    model.end(0)
    model.run((1, 1))
    model.end(1)
    assert model.tiers.stats().idle == 3
    model.end(0)  # the third page becomes idle as the last
    assert model.tiers.stats().idle == 4
    model.run((1, 0, 1, 0, 1, 0, 1, 0, 1, 0))  # three free pages and two idle ones
    assert [len(model.tiers.find(digests_of(text))) for text in ((1, 1), (0, 0, 0, 0, 1, 1))] == [0, 2]


def test_idle_pages_that_are_shared_again_and_again_leave_no_trace() -> None:
    model = Model(num_pages=8, num_host_pages=0)
    for _ in range(500):
        model.run((0, 1, 0, 1, 0, 0))
        model.end(0)
    assert len(model.tiers._idle._leaves) < 100


def test_a_leaf_that_would_never_be_evicted_is_missed() -> None:
    model = Model(num_pages=4, num_host_pages=0)
    model.run((0, 1, 0, 1))
    model.end(0)
    del model.tiers._idle._leaves[:]
    with pytest.raises(AssertionError, match="leaves are not to be evicted"):
        model.settle()


def test_a_host_page_that_would_leave_before_one_behind_it_is_missed() -> None:
    model = Model(num_pages=2, num_host_pages=2)
    model.run((0, 1, 0, 1))
    model.end(0)
    model.run((1, 1, 1, 1))
    assert model.tiers.stats().host_in_use == 2
    model.tiers._on_host.move_to_end(next(iter(model.tiers._on_host)))
    with pytest.raises(AssertionError, match="would give up a page before one behind it"):
        model.settle()


@pytest.mark.usefixtures("no_collector")
def test_eviction_takes_time_in_proportion_to_the_pages_that_it_frees() -> None:
    """Also of a chain whose pages have others behind them, one after the other until the last has left."""

    def seconds(num_pages: int) -> float:
        tiers = KvPages(3 * num_pages, num_host_pages=0)
        digests = digests_of((0,) * (PAGE_SIZE * (num_pages + 1)))
        pages, behind = tiers.take(num_pages), tiers.take(1)
        for place, page in enumerate([*pages.tolist(), *behind.tolist()]):
            tiers.insert(Node(page=page), digests[place], parent=digests[place - 1] if place else None)
        tiers.release(pages)
        other = tiers.take(num_pages)
        tiers.release(other, pending=[Node(page=page) for page in other.tolist()])
        tiers.take(num_pages)  # what was free, and some of the others
        begin_s = time.thread_time()
        tiers.take(num_pages)
        return time.thread_time() - begin_s

    short, long = (min(seconds(num_pages) for _ in range(5)) for num_pages in (500, 4_000))
    assert long < 5 * 8 * short
