"""The order in which idle pages of the device are evicted: least recently used first, leaves before parents.

A page can be evicted once none of the device is behind it: it is a *leaf*. A heap holds the leaves by age, so
that the next one is found without a walk over the others::

    idle, the oldest first    a  a.b  c  (a.b is behind a)      evicted    a.b, a, c
    heap of leaves            a.b  c  ── evict a.b ──▶  a  c

Entries whose page was taken again, or has another page behind it now, stay in the heap and are passed over
when their turn comes; it is built anew when they are most of it.
"""

from collections import OrderedDict
from collections.abc import Iterable
from heapq import heappop, heappush

from albireo_jax.sched.prefix_tree import Node

_SPARE_ENTRIES = 64


class IdlePages:
    """The nodes on idle pages; `note_leaf` is called when the last page behind a node has left the device."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, Node] = OrderedDict()  # by age, which counts from 1, the oldest first
        self._leaves: list[int] = []  # heap of ages
        self._age = 0

    def __len__(self) -> int:
        """Number of idle pages."""
        return len(self._nodes)

    def nodes(self) -> list[Node]:
        """All nodes, the longest idle first."""
        return list(self._nodes.values())

    def extend(self, nodes: Iterable[Node]) -> None:
        """Make the pages of `nodes` idle, one after the other."""
        for node in nodes:
            self._age += 1
            node.idle_since = self._age
            self._nodes[node.idle_since] = node
            if not node.device_children:
                self._leaves.append(node.idle_since)  # the largest, so that a heap stays one
        if len(self._leaves) > 2 * len(self._nodes) + _SPARE_ENTRIES:
            self._leaves = [age for age, node in self._nodes.items() if not node.device_children]

    def replace(self, node: Node, by: Node) -> None:
        """Let another leaf stand for the page of `node`, if that is idle; it keeps its place in the order."""
        if node.idle_since:
            by.idle_since, node.idle_since = node.idle_since, 0
            self._nodes[by.idle_since] = by

    def note_leaf(self, node: Node | None) -> None:
        """Note that a node is a leaf, if it is and its page is idle."""
        if node is not None and node.idle_since and not node.device_children:
            heappush(self._leaves, node.idle_since)

    def remove(self, node: Node) -> None:
        """Take out a node whose page is owned now, or free."""
        del self._nodes[node.idle_since]
        node.idle_since = 0

    def pop(self) -> Node:
        """Take out the node to evict next: the oldest leaf, or if all leaves are owned the oldest of all."""
        while self._leaves:
            node = self._nodes.get(heappop(self._leaves))
            if node is not None and not node.device_children:
                self.remove(node)
                return node
        node = next(iter(self._nodes.values()))
        self.remove(node)
        return node

    def check_invariants(self) -> None:
        """Raise AssertionError if a leaf would never be evicted, or a node is not where its age says."""
        assert all(node.idle_since == age for age, node in self._nodes.items()), "a node has another's age"
        assert list(self._nodes) == sorted(self._nodes), "idle pages are not in the order of their age"
        leaves = {age for age, node in self._nodes.items() if not node.device_children}
        assert leaves <= set(self._leaves), f"leaves are not to be evicted: {leaves - set(self._leaves)}"
