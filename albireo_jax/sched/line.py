"""The line of requests that wait, and what the first of them need before they may start.

What a request finds on the host is copied to the device while it waits, so many pages with each step, because
the next step waits for them and they stand beside the cache for a while. Once the last of these steps is
committed, they are there. Until then it owns the pages, and nobody overtakes it; but those behind it may have
theirs copied meanwhile::

    step      N              N + 1          N + 2 (after the commit of N)
    first     copies start   waits          starts behind them
    second    waits          copies start   waits
    running   computed       computed       computed

A request behind the first holds pages only while there are enough for those before it as well, and gives
them up as soon as one that runs, or one before it, cannot do without.
"""

import itertools
from collections import deque
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import NULL_PAGE, Int32s
from albireo_jax.sched import policy
from albireo_jax.sched.caching import PrefixCache
from albireo_jax.sched.prefix import Node
from albireo_jax.sched.sequence import NOT_ADMITTED, Sequence
from albireo_jax.sched.tiers import PageTiers

_MOST_HOLDERS = 4
"""Requests at the head of the line that may have pages copied before they start."""


class Startable(NamedTuple):
    """A request that may start behind the pages of a chain, which it owns."""

    sequence: Sequence
    chain: list[Node]


class WaitingLine:
    """Requests in the order in which they start; a step copies `max_copied` pages to the device at most."""

    def __init__(self, tiers: PageTiers, cache: PrefixCache, *, page_size: int, max_copied: int) -> None:
        self._tiers = tiers
        self._cache = cache
        self._page_size = page_size
        self._max_copied = max_copied
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def append(self, sequence: Sequence) -> None:
        """Queue a request behind all others."""
        self._waiting.append(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Put back a request that gave way."""
        policy.requeue(self._waiting, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a request that was aborted, wherever it is."""
        self._waiting.remove(sequence)
        self._let_go(sequence)

    def pop(self, *, num_running: int, committed_step: int) -> Startable | None:
        """Take out the first in line if it may start beside so many, and all that it found is there."""
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        if sequence.restored_by is not None and committed_step < sequence.restored_by:
            return None
        chain = self._cache.find(sequence)
        if not _is_on_device(chain) or not self._fits(sequence, chain, num_running=num_running):
            return None
        while not num_running and self._missing(sequence, chain) > self._available(chain):
            if not self.give_way(keeping=1):
                break
        self._tiers.share(chain[len(sequence.held) :])
        sequence.held, sequence.restored_by = [], None
        return Startable(self._waiting.popleft(), chain)

    def restore(self, *, num_running: int, step: int) -> None:
        """Have `step` copy the next pages that the first in line found on the host, if they could start then.

        Must come after everything else that takes pages for that step.
        """
        if not self._tiers.num_on_host:
            return
        left, reserved = self._max_copied, 0
        for place, sequence in enumerate(itertools.islice(self._waiting, _MOST_HOLDERS)):
            chain = self._cache.find(sequence)
            if not self._fits(sequence, chain, num_running=num_running + place, reserved=reserved):
                return
            on_host = [at for at, node in enumerate(chain) if node.page == NULL_PAGE]
            if on_host:
                held = chain[: on_host[left]] if len(on_host) > left else chain
                self._tiers.restore(held[len(sequence.held) :])
                sequence.held, sequence.restored_by = held, step
                left -= min(left, len(on_host))
            if not left:
                return
            reserved += -(-len(sequence.known_ids) // self._page_size) - len(sequence.held)

    def give_way(self, *, keeping: int = 0) -> bool:
        """Let the last in line that holds pages give them up; False if none does but the first `keeping`."""
        holders = [sequence for sequence in itertools.islice(self._waiting, keeping, None) if sequence.held]
        if holders:
            self._let_go(holders[-1])
        return bool(holders)

    def check_invariants(self) -> None:
        """Raise AssertionError if a waiting request has what only a running one may have."""
        for place, sequence in enumerate(self._waiting):
            assert sequence.epoch == NOT_ADMITTED, "a waiting request is admitted"
            assert place < _MOST_HOLDERS or not sequence.held, "one holds pages too far behind"

    def held_pages(self) -> Int32s:
        """The pages that waiting requests hold."""
        held = [node.page for sequence in self._waiting for node in sequence.held]
        return np.array(held, np.int32)

    def _fits(self, sequence: Sequence, chain: list[Node], *, num_running: int, reserved: int = 0) -> bool:
        """Whether there are pages for what the sequence knows beside those of `chain` on the device."""
        return policy.may_start(
            num_pages=self._missing(sequence, chain) + reserved,
            num_free=self._available(chain),
            num_running=num_running,
        )

    def _missing(self, sequence: Sequence, chain: list[Node]) -> int:
        """Pages that the sequence needs beside those of `chain` that are on the device."""
        found = sum(node.page != NULL_PAGE for node in chain)
        return -(-len(sequence.known_ids) // self._page_size) - found

    def _available(self, chain: list[Node]) -> int:
        """Pages to be had once those of `chain` are owned."""
        return self._tiers.num_available - self._tiers.num_idle(chain)

    def _let_go(self, sequence: Sequence) -> None:
        """Release the pages that a request holds; they stay idle where they are."""
        self._tiers.release(np.array([node.page for node in sequence.held], np.int32))
        sequence.held, sequence.restored_by = [], None


def _is_on_device(chain: list[Node]) -> bool:
    return all(node.page != NULL_PAGE for node in chain)
