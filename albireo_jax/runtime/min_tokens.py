"""The program that keeps rows below their `min_tokens` from ending; a step without such rows calls none."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from albireo_jax.runtime.sampling_programs import jit_ban
from albireo_jax.runtime.state import SamplerState
from albireo_jax.runtime.step import StepProgram


@dataclass(frozen=True, slots=True)
class MinTokensProgram:
    """A program that takes the banned ids out of the logits of `rows` rows."""

    rows: int


class MinTokensCalls:
    """Takes the stop ids of rows that may not end yet out of their logits."""

    def __init__(self, program: StepProgram) -> None:
        self._program = program
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}

    def programs(
        self, row_counts: Iterable[int], state: SamplerState
    ) -> dict[MinTokensProgram, Callable[[], jax.stages.Lowered]]:
        """All programs, for steps of these numbers of rows, ready to be lowered."""
        return {MinTokensProgram(rows): partial(self._lower, rows, state) for rows in row_counts}

    def use(self, compiled: Mapping[Any, jax.stages.Compiled]) -> None:
        """Run these executables of `programs` from now on."""
        self._compiled = compiled

    def apply(self, state: SamplerState, logits_RV: jax.Array, *, rows: NDArray[np.int32]) -> jax.Array:
        """The logits of a step without those of banned ids; `rows` is its buffer of `pack_rows`.

        The parameters of the step's new slots are in the state already.
        """
        return self._compiled[MinTokensProgram(len(logits_RV))](state.params_ZF, logits_RV, rows)

    def _lower(self, rows: int, state: SamplerState) -> jax.stages.Lowered:
        return jit_ban(self._program).lower(
            state.params_ZF, self._program.logits(rows), self._program.ints(3 * rows)
        )
