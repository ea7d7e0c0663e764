"""The calls that apply logit rules to the rows of a step; a step without such rows makes no call."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import jax
import numpy as np

from albireo_jax.runtime.logit_rule_programs import (
    MASKS,
    RULED_ADMISSIONS,
    AdmissionPacker,
    LogitRulesShape,
    jit_admit_rules,
    jit_apply,
    jit_masks,
    jit_note,
)
from albireo_jax.runtime.packed_rules import PackedRules
from albireo_jax.runtime.step import StepProgram
from albireo_jax.sampling.logits import Rules


class LogitRuleKind(StrEnum):
    """Programs that keep logit rules on the device, by what each does."""

    ADMIT = "admit rules"
    MASK = "write masks"
    APPLY = "apply rules"
    NOTE = "note tokens"


@dataclass(frozen=True, slots=True)
class LogitRuleProgram:
    """A program for rows with rules; `rows` is 0 for a program that serves any number."""

    kind: LogitRuleKind
    rows: int = 0


class LogitRuleCalls:
    """The rules of all slots on the devices of `program`, changed and applied in the order of the steps."""

    def __init__(self, program: StepProgram, rules: Rules, *, max_len: int) -> None:
        self._program = program
        self._rules = rules
        self._shape = LogitRulesShape(*rules.seen_Zv.shape, max_len=max_len)
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}

    @property
    def shape(self) -> LogitRulesShape:
        """The sizes that rules are packed for."""
        return self._shape

    def programs(self, row_counts: Iterable[int]) -> dict[LogitRuleProgram, Callable[[], jax.stages.Lowered]]:
        """All programs, for steps of these numbers of rows, ready to be lowered."""
        found = {
            LogitRuleProgram(LogitRuleKind.ADMIT): partial(self._lower_admit),
            LogitRuleProgram(LogitRuleKind.MASK): partial(self._lower_mask),
        }
        for rows in dict.fromkeys(row_counts):
            found[LogitRuleProgram(LogitRuleKind.APPLY, rows)] = partial(self._lower_apply, rows)
            found[LogitRuleProgram(LogitRuleKind.NOTE, rows)] = partial(self._lower_note, rows)
        return found

    def use(self, compiled: Mapping[Any, jax.stages.Compiled]) -> None:
        """Run these executables of `programs` from now on."""
        self._compiled = compiled

    def write(self, rules: PackedRules) -> None:
        """Write a step's rules and masks into their slots."""
        for words in rules.admissions:
            self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.ADMIT)](self._rules, words)
        for words in rules.masks:
            self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.MASK)](self._rules, words)

    def apply(self, rules: PackedRules, logits_RV: jax.Array) -> jax.Array:
        """The step's logits, changed by its rows' rules, which are written already."""
        if rules.rows is None:
            return logits_RV
        slot_R = rules.rows.read_slot_R
        return self._compiled[LogitRuleProgram(LogitRuleKind.APPLY, len(slot_R))](
            self._rules, slot_R, logits_RV
        )

    def note(self, rules: PackedRules, id_R: jax.Array) -> None:
        """Count the tokens that the step's rows with rules sampled."""
        if rules.rows is None:
            return
        slot_R = rules.rows.count_slot_R
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.NOTE, len(slot_R))](
            self._rules, slot_R, id_R
        )

    def warm_up(self, logits_RV: jax.Array, id_R: jax.Array) -> None:
        """Run every program for steps of R rows once; no slot's rules change."""
        none_R = np.full(id_R.shape[0], self._shape.num_slots, np.int32)
        masks = np.zeros((MASKS, 1 + self._shape.mask_words), np.int32)
        masks[:, 0] = self._shape.num_slots
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.ADMIT)](
            self._rules, AdmissionPacker(self._shape).pack(())
        )
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.MASK)](self._rules, masks)
        self._compiled[LogitRuleProgram(LogitRuleKind.APPLY, len(none_R))](self._rules, none_R - 1, logits_RV)
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.NOTE, len(none_R))](
            self._rules, none_R, id_R
        )

    def _lower_admit(self) -> jax.stages.Lowered:
        words = self._program.ints(RULED_ADMISSIONS, self._shape.admission_words)
        return jit_admit_rules(self._program, self._shape).lower(self._rules, words)

    def _lower_mask(self) -> jax.stages.Lowered:
        return jit_masks(self._program).lower(
            self._rules, self._program.ints(MASKS, 1 + self._shape.mask_words)
        )

    def _lower_apply(self, rows: int) -> jax.stages.Lowered:
        return jit_apply(self._program).lower(
            self._rules, self._program.ints(rows), self._program.logits(rows)
        )

    def _lower_note(self, rows: int) -> jax.stages.Lowered:
        return jit_note(self._program).lower(self._rules, self._program.ints(rows), self._program.ints(rows))
