"""The masks of a step, and of the rows that wait for theirs."""

from collections.abc import Mapping

import numpy as np

from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import FinishReason
from albireo_jax.sched.constraints import NO_MASKS, MaskMaker, Masks
from albireo_jax.sched.sequence import Sequence, SlotTable


def masks_of(sampling: Int32s, table: SlotTable, live: dict[str, Sequence]) -> Masks:
    """The masks of the `sampling` slots that have a constraint."""
    slots = sampling[table.constrained[sampling]]
    answers = [live[request_id].answer for request_id in table.request_id[slots].tolist()]
    words = [answer.mask for answer in answers if answer is not None]
    return Masks(slots, np.stack(words)) if words else NO_MASKS


class PendingMasks:
    """Has masks made by a `maker`, and knows the live requests whose masks are not made yet.

    Such requests are held. One that is preempted while it is held waits for its mask in the waiting queue,
    where it has its place. The mask is the same, since a preempted request keeps all committed tokens.
    """

    def __init__(self, maker: MaskMaker, table: SlotTable) -> None:
        self._maker = maker
        self._table = table
        self.num_constrained = 0  # live requests that have a constraint
        self._late: dict[str, Sequence] = {}  # by request, in the order of their tokens

    def make(self, due: Mapping[int, Sequence]) -> dict[int, FinishReason]:
        """Have the masks of `due` made, each in a slot; the reasons of those that end, by their key."""
        self._maker.make([sequence.answer for sequence in due.values() if sequence.answer is not None])
        reasons: dict[int, FinishReason] = {}
        for key, sequence in due.items():
            assert sequence.answer is not None
            if not sequence.answer.is_made:
                self._late[sequence.request.request_id] = sequence
                self._table.awaits_mask[sequence.slot] = True
            elif (reason := sequence.answer.settle()) is not None:
                reasons[key] = reason
        return reasons

    def take(self, timeout_s: float) -> list[tuple[Sequence, FinishReason]]:
        """Let requests whose masks were made go on, after a wait if there is none; those that end instead."""
        answers = [sequence.answer for sequence in self._late.values() if sequence.answer is not None]
        if answers and timeout_s and not any(answer.is_made for answer in answers):
            self._maker.wait(answers, timeout_s)
        ended: list[tuple[Sequence, FinishReason]] = []
        for answer in answers:
            if answer.is_made:
                sequence = self._late.pop(answer.request_id)
                if sequence.slot is not None:
                    self._table.awaits_mask[sequence.slot] = False
                if (reason := answer.settle()) is not None:
                    ended.append((sequence, reason))
        return ended

    def drop(self, sequence: Sequence) -> None:
        """Forget a request that ended."""
        self._late.pop(sequence.request.request_id, None)
        if sequence.answer is not None:
            sequence.answer.drop()
            self.num_constrained -= 1
