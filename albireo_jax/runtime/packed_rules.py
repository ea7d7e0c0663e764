"""The logit rules of a step as arrays: the words of new rules and masks, and the rows that have rules."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import Int32s, SlotParams, StepPlan
from albireo_jax.runtime.logit_rule_programs import (
    MASKS,
    RULED_ADMISSIONS,
    AdmissionPacker,
    LogitRulesShape,
    pack_masks,
)


class RuledRows(NamedTuple):
    """Two slots for each of R rows: one whose rules change its logits, and one that counts its token.

    Rows without rules read the padding slot's, which change nothing, and count in a slot past the last one.
    """

    read_slot_R: Int32s
    count_slot_R: Int32s


class PackedRules(NamedTuple):
    """The rules of a step; `rows` is None if no row that samples has any."""

    admissions: Sequence[Int32s]
    masks: Sequence[Int32s]
    rows: RuledRows | None


class RulePacker:
    """Packs the rules of plans, in their order: it remembers which slots have rules."""

    def __init__(self, shape: LogitRulesShape) -> None:
        self._shape = shape
        self._packer = AdmissionPacker(shape)
        self._has_rules_Z = np.zeros(shape.num_slots, np.bool_)

    def pack(self, plan: StepPlan, *, rows: int) -> PackedRules:
        """The rules of a plan's step, which is padded to so many rows."""
        for params in plan.new_slots:
            self._has_rules_Z[params.slot] = params.rules is not None
        return PackedRules(
            admissions=self._admissions(plan.new_slots),
            masks=self._masks(plan),
            rows=self._rows(plan, rows),
        )

    def _admissions(self, new_slots: Sequence[SlotParams]) -> list[Int32s]:
        admitted = [(params.slot, params.rules) for params in new_slots if params.rules is not None]
        firsts = range(0, len(admitted), RULED_ADMISSIONS)
        return [self._packer.pack(admitted[first : first + RULED_ADMISSIONS]) for first in firsts]

    def _masks(self, plan: StepPlan) -> list[Int32s]:
        parts = [slice(first, first + MASKS) for first in range(0, len(plan.mask_slots), MASKS)]
        return [pack_masks(plan.mask_slots[part], plan.masks[part], self._shape) for part in parts]

    def _rows(self, plan: StepPlan, rows: int) -> RuledRows | None:
        has_rules = self._has_rules_Z[plan.slots]
        counts = has_rules & plan.samples
        if not np.count_nonzero(counts):
            return None
        num_slots = self._shape.num_slots
        return RuledRows(
            read_slot_R=_padded(np.where(has_rules, plan.slots, num_slots - 1), rows, num_slots - 1),
            count_slot_R=_padded(np.where(counts, plan.slots, num_slots), rows, num_slots),
        )


def _padded(slots: Int32s, rows: int, padding: int) -> Int32s:
    slot_R = np.full(rows, padding, np.int32)
    slot_R[: len(slots)] = slots
    return slot_R
