"""The calls that apply logit rules to the rows of a step; a step without such rows makes no call."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import jax
import numpy as np

from albireo_jax.core.plan import Bools, Int32s, StepPlan
from albireo_jax.runtime.logit_rule_programs import (
    MASKS,
    RULED_ADMISSIONS,
    AdmissionPacker,
    LogitRulesShape,
    jit_admit_rules,
    jit_apply,
    jit_masks,
    jit_note,
    pack_masks,
)
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
    """A program for rows with rules; `rows` is 0 for those that serve any number."""

    kind: LogitRuleKind
    rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRuleStep:
    """The rows of a step that have rules: R slots, and which of the rows sample."""

    is_ruled_R: Bools
    samples_R: Bools
    slot_R: Int32s


class LogitRuleCalls:
    """The rules of all slots on the devices of `program`, changed and applied in the order of the steps."""

    def __init__(self, program: StepProgram, rules: Rules, *, max_len: int) -> None:
        self._program = program
        self._rules = rules
        self._shape = LogitRulesShape(*rules.seen_Zv.shape, max_len=max_len)
        self._packer = AdmissionPacker(self._shape)
        self._is_ruled = np.zeros(self._shape.num_slots, np.bool_)
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}

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

    def prepare(self, plan: StepPlan) -> LogitRuleStep | None:
        """Take in the rules and masks of a plan; its rows with rules, None if there are none that sample."""
        for params in plan.new_slots:
            self._is_ruled[params.slot] = params.rules is not None
        admitted = [(params.slot, params.rules) for params in plan.new_slots if params.rules is not None]
        for first in range(0, len(admitted), RULED_ADMISSIONS):
            words = self._packer.pack(admitted[first : first + RULED_ADMISSIONS])
            self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.ADMIT)](self._rules, words)
        for first in range(0, len(plan.mask_slots), MASKS):
            words = pack_masks(plan, first, self._shape)
            self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.MASK)](self._rules, words)
        is_ruled = self._is_ruled[plan.slots]
        if not (is_ruled & plan.samples).any():
            return None
        return LogitRuleStep(is_ruled_R=is_ruled, samples_R=plan.samples, slot_R=plan.slots)

    def apply(self, step: LogitRuleStep | None, logits_RV: jax.Array) -> jax.Array:
        """The step's logits, changed by its rows' rules; rows without read the padding slot's."""
        if step is None:
            return logits_RV
        slot_R = np.full(logits_RV.shape[0], self._shape.num_slots - 1, np.int32)
        slot_R[: len(step.slot_R)][step.is_ruled_R] = step.slot_R[step.is_ruled_R]
        return self._compiled[LogitRuleProgram(LogitRuleKind.APPLY, len(slot_R))](
            self._rules, slot_R, logits_RV
        )

    def note(self, step: LogitRuleStep | None, id_R: jax.Array) -> None:
        """Count the tokens that the step's rows with rules sampled."""
        if step is None:
            return
        slot_R = np.full(id_R.shape[0], self._shape.num_slots, np.int32)  # no slot
        noted = step.is_ruled_R & step.samples_R
        slot_R[: len(step.slot_R)][noted] = step.slot_R[noted]
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.NOTE, len(slot_R))](
            self._rules, slot_R, id_R
        )

    def warm_up(self, logits_RV: jax.Array, id_R: jax.Array) -> None:
        """Run every program for steps of R rows once; no slot's rules change."""
        none_R = np.full(id_R.shape[0], self._shape.num_slots, np.int32)
        masks = np.zeros((MASKS, 1 + self._shape.mask_words), np.int32)
        masks[:, 0] = self._shape.num_slots
        self._rules = self._compiled[LogitRuleProgram(LogitRuleKind.ADMIT)](
            self._rules, self._packer.pack(())
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
