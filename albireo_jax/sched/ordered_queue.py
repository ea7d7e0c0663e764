"""A queue of sequences in the order of their places, whose first few are known at any time.

The first few are a sorted list. All others are a heap of places::

    first   1 3 4 7     behind   8 ─┬─ 9        push 2:    first 1 2 3 4, and 7 goes behind
                                    └─ 12       remove 1:  first 3 4 7 8

A sequence that leaves from behind leaves its place in the heap. Such a place is passed over when its turn
comes; the heap is built anew once most of it is such places. So each call costs O(log n) on average.
"""

from bisect import bisect
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from albireo_jax.sched.sequence import Place, Sequence, place_of

_SPARE_ENTRIES = 64
"""Places without a sequence that a heap of any size may have."""


class OrderedQueue:
    """Sequences of different places; `first` are up to `num_first` of the lowest, the lowest first."""

    def __init__(self, num_first: int) -> None:
        self.first: list[Sequence] = []
        self._num_first = num_first
        self._behind: dict[Place, Sequence] = {}
        self._heap: list[Place] = []

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.first) + len(self._behind)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences: the first ones in order, the others in any."""
        yield from self.first
        yield from self._behind.values()

    def push(self, sequence: Sequence) -> list[Sequence]:
        """Put in a sequence; gives those that were among the first and come after it."""
        first = self.first
        if len(first) == self._num_first and sequence.place > first[-1].place:
            self._push_behind(sequence)
            return []
        index = bisect(first, sequence.place, key=place_of)
        after = first[index:]
        first.insert(index, sequence)
        if len(first) > self._num_first:
            self._push_behind(first.pop())
        return after

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence, wherever it is."""
        if self._behind.pop(sequence.place, None) is None:
            self.first.remove(sequence)
            self._refill()
        elif len(self._heap) > 2 * len(self._behind) + _SPARE_ENTRIES:
            self._heap = list(self._behind)
            heapify(self._heap)

    def check_invariants(self) -> None:
        """Raise AssertionError if a sequence is lost, or is not where its place says."""
        places = [sequence.place for sequence in self]
        assert places[: self._num_first] == sorted(places)[: self._num_first], "others are first"
        assert len(self.first) == min(len(places), self._num_first), "too few are first"
        assert self._behind.keys() <= set(self._heap), "a sequence is never found"
        assert all(place == sequence.place for place, sequence in self._behind.items()), "a place changed"

    def _push_behind(self, sequence: Sequence) -> None:
        self._behind[sequence.place] = sequence
        heappush(self._heap, sequence.place)

    def _refill(self) -> None:
        """Let the lowest of the others follow the first ones."""
        while self._behind and len(self.first) < self._num_first:
            sequence = self._behind.pop(heappop(self._heap), None)
            if sequence is not None:
                self.first.append(sequence)
