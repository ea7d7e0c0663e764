"""The pages of the device and those of the host: who owns them, what they hold, and what is copied.

A page on the device is *free*, *owned* by requests, or *idle*: without an owner, but with a prefix that may
be asked for again. Idle pages are handed out like free ones, the least recently used first, and never before
those behind it in its prefix. Its contents then move to the host if that has pages, or are lost::

      take            full and committed: insert        release               evicted
    free ──▶ owned ─────────────────────────▶ owned, a node ──▶ idle, a node ──▶ on the host, a node ──▶ gone
               ▲                                  ▲                │                   │
               └── reused                         └── share ◀──────┘      restore ◀────┘

The host gives up the page that it took longest ago, again never before one behind it. A preempted request
leaves its pages idle, like one that ended. When it comes back, it finds what is left of them on either tier;
swapping means no more than that here.

The last pages of a request may be filled by a step whose result is not known when they are released. Such
pages are *pending*: they are idle, least recently used first, and enter the prefix tree only if nothing took
them before the result arrived.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.plan import NULL_PAGE, Int32s, PageCopies
from albireo_jax.sched.eviction import IdlePages
from albireo_jax.sched.page_pool import PagePool
from albireo_jax.sched.prefix_tree import Digest, Node, PrefixTree


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPageStats:
    """Pages now, and how many were copied, given up or found since the start.

    `idle` pages hold prefixes and can be handed out. `lost` nodes were given up by both tiers.
    """

    in_use: int
    num_pages: int
    idle: int
    host_in_use: int
    num_host_pages: int
    copied_out: int
    copied_in: int
    lost: int


class KvPages:
    """Pages of both tiers, and the tree of those that can be found again; 0 host pages are no tier."""

    def __init__(self, num_pages: int, *, num_host_pages: int) -> None:
        self._device = PagePool(num_pages)
        self._host = PagePool(num_host_pages)
        self._tree = PrefixTree()
        self._idle = IdlePages()
        self._on_host: OrderedDict[int, Node] = (
            OrderedDict()
        )  # by host page, the one copied longest ago first
        self._node_of: dict[int, Node] = {}  # by device page, those in the tree
        self._to_host: dict[int, int] = {}  # device page by host page
        self._to_device: list[tuple[int, int]] = []
        self._copied_out = self._copied_in = self._lost = 0

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: free and idle ones."""
        return self._device.num_free + len(self._idle)

    @property
    def num_on_host(self) -> int:
        """Pages of the host that can be found."""
        return len(self._on_host)

    def stats(self) -> KvPageStats:
        """Counts of pages and events."""
        return KvPageStats(
            in_use=self._device.num_pages - self.num_available,
            num_pages=self._device.num_pages,
            idle=len(self._idle),
            host_in_use=len(self._on_host),
            num_host_pages=self._host.num_pages,
            copied_out=self._copied_out,
            copied_in=self._copied_in,
            lost=self._lost,
        )

    def take(self, count: int) -> Int32s:
        """`count` pages, each with one owner; idle ones are evicted as far as free ones do not suffice."""
        assert count <= self.num_available, f"{count} pages wanted, {self.num_available} available"
        if self._device.num_free < count:
            self._evict(count - self._device.num_free)
        return self._device.take(count)

    def release(self, pages: Int32s, *, pending: Sequence[Node] = ()) -> None:
        """Take one owner from each of `pages`, listed in the order of the tokens in them.

        Those without owners become idle if they hold a prefix or are `pending`, and free if not.
        """
        waiting = {node.page: node for node in pending}
        unowned = self._device.release(pages[::-1])  # the ends of prefixes first: they are evicted first
        nodes = [self._node_of.get(page) or waiting.get(page) for page in unowned.tolist()]
        self._idle.extend(node for node in nodes if node is not None)
        self._device.give_back(unowned[[node is None for node in nodes]])

    def get(self, digest: Digest) -> Node | None:
        """The page of this digest, on either tier."""
        return self._tree.get(digest)

    def find(self, digests: Sequence[Digest]) -> list[Node]:
        """The longest chain of pages with these digests, on either tier."""
        return self._tree.find(digests)

    def num_idle(self, chain: Sequence[Node]) -> int:
        """Number of idle pages in a chain; to own them takes them from those available."""
        return sum(node.idle_since > 0 for node in chain)

    def share(self, chain: Sequence[Node]) -> None:
        """Own the pages of a chain that is on the device."""
        pages = np.array([node.page for node in chain], np.int32)
        for page in self._device.share(pages).tolist():
            self._idle.remove(self._node_of[page])

    def restore(self, chain: Sequence[Node]) -> None:
        """Own the pages of a chain after copying to the device those that are on the host only.

        Nothing may be taken after this and before `copies`: what is on its way cannot be evicted.
        """
        self.share([node for node in chain if node.page != NULL_PAGE])
        missing = [node for node in chain if node.page == NULL_PAGE]
        for node in missing:
            del self._on_host[node.host_page]
        for node, page in zip(missing, self.take(len(missing)).tolist(), strict=True):
            self._to_device.append((node.host_page, page))
            self._tree.move(node, page=page, host_page=NULL_PAGE)
            self._node_of[page] = node
        self._copied_in += len(missing)

    def insert(self, node: Node, digest: Digest, *, parent: Digest | None) -> Node | None:
        """Let the page of `node` be found from now on, unless it was given away or another holds the same.

        If that other one is on the host, this page takes its place. Gives the node that it has in the tree.
        """
        if node.page == NULL_PAGE:
            return None
        known = self._tree.get(digest)
        if known is not None and known.page == NULL_PAGE and known.is_behind_device_pages:
            self._leave_host(known)
            self._tree.move(known, page=node.page, host_page=NULL_PAGE)
            self._node_of[node.page] = known
            self._idle.replace(node, by=known)
            known.is_proven = node.is_proven
            return known
        if not self._tree.insert(node, digest, parent=parent):
            return None
        self._node_of[node.page] = node
        return node

    def drop(self, node: Node) -> None:
        """Let a page be found no more, nor any behind it; nobody may be about to start behind them."""
        if node.digest:
            self._device.give_back(np.array(self._drop(node), np.int32))

    def copies(self) -> PageCopies:
        """The copies for the next plan; host pages that are copied from are free after it."""
        copies = PageCopies(
            to_host=tuple((page, host_page) for host_page, page in self._to_host.items()),
            to_device=tuple(self._to_device),
        )
        if self._to_device:
            left = np.array([host_page for host_page, _ in self._to_device], np.int32)
            self._host.give_back(self._host.release(left))
        self._to_host.clear()
        self._to_device.clear()
        return copies

    def check_unowned(self) -> None:
        """Raise AssertionError unless every page is free or can be handed out, by counting alone."""
        assert not self._device.owners.any(), "a page has an owner"
        lost = self._device.num_pages - self.num_available
        assert not lost, f"{lost} pages are lost"
        host_lost = self._host.num_pages - self._host.num_free - len(self._on_host)
        assert not host_lost, f"{host_lost} pages of the host are lost"

    def check_invariants(self, held: Int32s) -> None:
        """Raise AssertionError if pages and tree contradict each other; `held` lists all owned pages."""
        idle = np.array([node.page for node in self._idle.nodes()], np.int32)
        owners = np.bincount(held, minlength=self._device.num_pages + 1)
        assert np.array_equal(owners, self._device.owners), "owners differ from those of the page tables"
        pages = np.sort(np.concatenate((np.unique(held), idle, self._device.free_pages)))
        assert np.array_equal(pages, np.arange(1, self._device.num_pages + 1)), f"lost or doubled: {pages}"
        host_pages = np.sort(np.concatenate((np.array(list(self._on_host), np.int32), self._host.free_pages)))
        assert np.array_equal(host_pages, np.arange(1, self._host.num_pages + 1)), (
            f"lost or doubled: {host_pages}"
        )
        nodes = self._tree.nodes()
        assert {node.page for node in nodes if node.page} == set(self._node_of), (
            "nodes and their pages differ"
        )
        assert {node.host_page for node in nodes if node.host_page} == set(self._on_host)
        for node in nodes:
            assert (node.page == NULL_PAGE) != (node.host_page == NULL_PAGE), (
                "a node is on both tiers or none"
            )
            assert node.device_children == sum(child.page != NULL_PAGE for child in node.children.values())
            assert node.page != NULL_PAGE or not node.device_children, "a page left before one behind it"
            assert node.parent is None or node.parent.children[node.digest] is node
        self._idle.check_invariants()
        age = {host_page: age for age, host_page in enumerate(self._on_host)}
        for node in self._on_host.values():
            behind = [age[child.host_page] for child in node.children.values()]
            assert max(behind, default=-1) < age[node.host_page], (
                "the host would give up a page before one behind it"
            )

    def _evict(self, count: int) -> None:
        """Free `count` idle pages; more if others are lost with them."""
        freed: list[int] = []
        has_host = self._host.num_pages > 0
        while len(freed) < count:
            node = self._idle.pop()
            page = node.page
            if not node.digest:
                node.page = NULL_PAGE
            elif has_host and not node.device_children and (host_page := self._take_host_page()):
                self._move_to_host(node, host_page)
            else:
                freed += self._drop(node)
            freed.append(page)
        self._device.give_back(np.array(freed, np.int32))

    def _move_to_host(self, node: Node, host_page: int) -> None:
        """Have the page of a leaf copied to the host."""
        del self._node_of[node.page]
        self._to_host[host_page] = node.page
        self._on_host[host_page] = node
        self._tree.move(node, page=NULL_PAGE, host_page=host_page)
        self._idle.note_leaf(node.parent)
        self._copied_out += 1

    def _take_host_page(self) -> int:
        """A free page of the host, or the one that it gives up; NULL_PAGE if it has none.

        The page that was copied longest ago has none behind it: those were copied before it.
        """
        if self._host.num_free:
            return int(self._host.take(1)[0])
        leaf = next(iter(self._on_host.values()), None)
        if leaf is None:
            return NULL_PAGE
        host_page = leaf.host_page
        del self._on_host[host_page]
        self._to_host.pop(host_page, None)
        self._tree.remove(leaf)
        leaf.host_page = NULL_PAGE
        self._lost += 1
        return host_page

    def _leave_host(self, node: Node) -> None:
        """Free the host page of a node."""
        del self._on_host[node.host_page]
        self._to_host.pop(node.host_page, None)
        self._host.give_back(self._host.release(np.array([node.host_page], np.int32)))

    def _drop(self, node: Node) -> list[int]:
        """Let a page and those behind it be found no more; gives those of the device that nobody owns."""
        parent, unowned = node.parent, list[int]()
        for gone in self._tree.remove(node):
            if gone.host_page != NULL_PAGE:
                self._leave_host(gone)
            else:
                del self._node_of[gone.page]
                if gone.idle_since:
                    self._idle.remove(gone)
                    unowned.append(gone.page)
            gone.page = gone.host_page = NULL_PAGE
            self._lost += 1
        self._idle.note_leaf(parent)
        return unowned
