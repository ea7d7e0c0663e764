"""The requests that wait, and the pages that the first of them need before they may start.

Pages that a request finds on the host are copied to the device while it waits: a few with each step, because
the next step waits for them and they take memory beside the cache meanwhile. The pages are there once the
last of these steps is committed. Until then the request owns them, and nothing overtakes it, but requests
behind it may have theirs copied at the same time::

    step      N              N + 1          N + 2 (after the commit of N)
    first     copies start   waits          starts behind them
    second    waits          copies start   waits
    running   computed       computed       computed

A request behind the first holds pages only while there are enough for those before it as well. It gives them
up as soon as one that runs cannot do without, or one comes before it; they stay on the device for as long as
nothing takes them.
"""

from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import NULL_PAGE, Int32s
from albireo_jax.sched import policy
from albireo_jax.sched.kv_pages import KvPages
from albireo_jax.sched.ordered_queue import OrderedQueue
from albireo_jax.sched.prefix_cache import PrefixCache, SuspectPage, num_on_device
from albireo_jax.sched.prefix_tree import Node
from albireo_jax.sched.sequence import NOT_ADMITTED, Sequence, SlotTable

_MOST_HOLDERS = 4
"""Requests at the head of the queue that may have pages copied before they start."""


class Startable(NamedTuple):
    """A request that may start behind the pages of a chain, which it owns."""

    sequence: Sequence
    chain: list[Node]


class WaitingQueue:
    """Requests in the order in which they start, that of their places.

    A step copies `max_copied` pages to the device at most.
    """

    def __init__(
        self,
        tiers: KvPages,
        cache: PrefixCache,
        table: SlotTable,
        *,
        max_copied: int,
        max_step_tokens: int,
    ) -> None:
        self._tiers = tiers
        self._cache = cache
        self._table = table
        self._page_size = table.page_size
        self._max_copied = max_copied
        self._max_step_tokens = max_step_tokens
        self._queue = OrderedQueue(_MOST_HOLDERS)

    def __len__(self) -> int:
        """Number of requests that wait."""
        return len(self._queue)

    def push(self, sequence: Sequence) -> None:
        """Queue a request at its place; those behind it give up the pages that they hold."""
        for behind in self._queue.push(sequence):
            if behind.held:
                self._let_go(behind)

    def remove(self, sequence: Sequence) -> None:
        """Take out a request that was aborted, wherever it is."""
        self._queue.remove(sequence)
        self._let_go(sequence)

    def pop(self, running: Int32s, *, committed_step: int) -> Startable | None:
        """Take out the head if it may start beside those that run, and all pages that it found are there.

        The head also waits for pages that a step in flight computes and that it would compute again; that
        takes no longer than the steps that are planned already. It also waits if it was preempted before the
        mask of its next token was made. Nothing overtakes it meanwhile.
        """
        if not self._queue:
            return None
        sequence = self._queue.first[0]
        if sequence.answer is not None and sequence.answer.is_pending:
            return None
        if sequence.restored_by is not None and committed_step < sequence.restored_by:
            return None
        chain = self._cache.find(sequence)
        if num_on_device(chain) < len(chain) or self._cache.is_awaited(sequence, chain):
            return None
        if not self._fits(sequence, chain, running=running):
            return None
        while not len(running) and self._missing(sequence, chain) > self._available(chain):
            if not self.release_last(keeping=1):
                break
        self._tiers.share(chain[len(sequence.held) :])
        sequence.held, sequence.restored_by, sequence.chain = [], None, []
        self._queue.remove(sequence)
        return Startable(sequence, chain)

    def restore(self, running: Int32s, *, step: int) -> None:
        """Have `step` copy the next pages that the first requests found on the host, if they may start then.

        Must come after everything else that takes pages for that step.
        """
        if not self._tiers.num_on_host:
            return
        left, reserved = self._max_copied, 0
        for place, sequence in enumerate(self._queue.first):
            chain = self._cache.find(sequence)
            if not self._fits(sequence, chain, running=running, place=place, reserved=reserved):
                return
            on_device = num_on_device(chain)
            if on_device < len(chain):
                held = chain[: on_device + left]
                self._tiers.restore(held[len(sequence.held) :])
                sequence.held, sequence.restored_by = held, step
                left -= len(held) - on_device
            if not left:
                return
            reserved += -(-len(sequence.known_ids) // self._page_size) - len(sequence.held)

    def release_last(self, *, keeping: int = 0) -> bool:
        """Release what the last holder behind the first `keeping` requests has; False if there is none."""
        holders = self._holders(keeping)
        if holders:
            self._let_go(holders[-1])
        return bool(holders)

    def drop(self, suspect: SuspectPage, running: Int32s) -> None:
        """Let a page be found no more, nor any behind it, now or later; those that have it may go on.

        Their own logits will tell whether they can.
        """
        for sequence in self._holders():
            if suspect.node in sequence.held:
                self._let_go(sequence)
        if suspect.node.page != NULL_PAGE:
            self._table.keep_unfound(running, page=suspect.node.page, place=suspect.place)
        self._tiers.drop(suspect.node)

    def check_invariants(self) -> None:
        """Raise AssertionError if a waiting request has what only a running one may have."""
        self._queue.check_invariants()
        for place, sequence in enumerate(self._queue):
            assert sequence.epoch == NOT_ADMITTED, "a waiting request is admitted"
            assert place < _MOST_HOLDERS or not sequence.held, "one holds pages too far behind"

    def held_pages(self) -> Int32s:
        """The pages that waiting requests hold."""
        held = [node.page for sequence in self._queue.first for node in sequence.held]
        return np.array(held, np.int32)

    def _holders(self, keeping: int = 0) -> list[Sequence]:
        """The waiting requests that hold pages, without the first `keeping` of the queue."""
        return [sequence for sequence in self._queue.first[keeping:] if sequence.held]

    def _fits(
        self, sequence: Sequence, chain: list[Node], *, running: Int32s, place: int = 0, reserved: int = 0
    ) -> bool:
        """Whether there are pages for its known tokens, and those for `reserved`, at `place` in the queue."""
        num_tokens = len(sequence.known_ids) - len(chain) * self._page_size
        num_steps = 1 - (1 - num_tokens) // max(1, self._max_step_tokens - len(running))
        return policy.may_start(
            num_pages=self._missing(sequence, chain) + reserved,
            num_free=self._available(chain),
            num_running=len(running) + place,
            growth=self._table.growth(running, num_steps=num_steps),
        )

    def _missing(self, sequence: Sequence, chain: list[Node]) -> int:
        """Pages that the sequence needs beside those of `chain` that are on the device."""
        return -(-len(sequence.known_ids) // self._page_size) - num_on_device(chain)

    def _available(self, chain: list[Node]) -> int:
        """Pages to be had once those of `chain` are owned."""
        return self._tiers.num_available - self._tiers.num_idle(chain)

    def _let_go(self, sequence: Sequence) -> None:
        """Release the pages that a request holds; they stay idle where they are."""
        self._tiers.release(np.array([node.page for node in sequence.held], np.int32))
        sequence.held, sequence.restored_by = [], None
