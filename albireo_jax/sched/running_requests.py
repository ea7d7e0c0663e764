"""The requests that run: their slots, in two orders, and their pages."""

from bisect import bisect_left, insort
from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import numpy as np

from albireo_jax.core.plan import Int32s, SlotParams
from albireo_jax.sched.kv_pages import KvPages
from albireo_jax.sched.prefix_tree import Node
from albireo_jax.sched.sequence import NOT_ADMITTED, Sequence, SlotTable, place_of

_MAX_EPOCH = 2**31 - 1


class RunningRequests:
    """The slots of a table that have a request, and those that are free.

    `slots` are in the order in which their requests started; `in_order` are the same requests in the order of
    the policy, the lowest place first.
    """

    def __init__(self, table: SlotTable, tiers: KvPages, *, max_rows: int) -> None:
        self.slots: Int32s = np.zeros(0, np.int32)
        self.in_order: list[Sequence] = []
        self._table = table
        self._tiers = tiers
        self._free_slots = list(range(max_rows - 1, -1, -1))
        self._epoch = NOT_ADMITTED

    def __len__(self) -> int:
        """Number of requests that run."""
        return len(self.slots)

    @property
    def has_free_slot(self) -> bool:
        """Whether one more request may run."""
        return bool(self._free_slots)

    @property
    def num_decoding(self) -> int:
        """Number of requests that have all known tokens computed: all, or all but the last that started."""
        return self._table.num_decoding(self.slots)

    def start(self, sequence: Sequence, chain: list[Node]) -> SlotParams:
        """Admit a request as the last that started, behind the pages of `chain`, which it owns."""
        slot = self._free_slots.pop()
        self._epoch = self._epoch % _MAX_EPOCH + 1
        sequence.epoch, sequence.slot = self._epoch, slot
        sequence.unproven = [node for node in chain if not node.is_proven]
        pages = tuple(node.page for node in chain)
        self._table.fill(slot, sequence, pages)
        self.slots = np.append(self.slots, np.int32(slot))
        insort(self.in_order, sequence, key=place_of)
        return sequence.slot_params(slot, pages)

    def release(self, sequences: list[Sequence], *, pending: Ordered[Node] = ()) -> None:
        """Free slots and their pages; later steps may reuse both, since the device runs steps in order.

        Pages that are being filled are `pending`. The pages become idle as if the slots were freed one after
        the other, each from its last page on.
        """
        if not sequences:
            return
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        for sequence in sequences:
            sequence.slot = None
            del self.in_order[bisect_left(self.in_order, sequence.place, key=place_of)]
        self._tiers.release(self._table.clear(slots[::-1]), pending=pending)
        self._free_slots.extend(slots.tolist())
        self.slots = self.slots[self._table.epoch[self.slots] != NOT_ADMITTED]

    def check_invariants(self, live: Mapping[str, Sequence]) -> None:
        """Raise AssertionError if slots are lost, or the two orders differ in more than their order."""
        self._table.check_invariants(self.slots, self._free_slots, live)
        places = [sequence.place for sequence in self.in_order]
        assert places == sorted(places), "requests that run are not in order"
        assert {sequence.slot for sequence in self.in_order} == set(self.slots.tolist()), "a request is lost"
