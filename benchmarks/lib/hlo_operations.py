"""The work of a compiled program: elementary operations of each instruction, read from its text.

XLA's own `cost_analysis` counts the body of a loop once and the dearest branch of a conditional, whatever
runs. Here each instruction counts as often as it ran, which the caller knows, from `traces` for one.

An elementwise operation counts 1 for each element of its result, on floats, integers or truth values, a
logarithm no more than an addition. A reduction counts what it applies once for each element it reads; a sort
of n what it compares with n log2(n) times. What only moves data counts nothing. Products of matrices
and custom calls are not counted either: a program that has some does more than this says.
"""

import re
from collections.abc import Mapping
from math import ceil, log2, prod
from typing import NamedTuple

from benchmarks.lib.hlo import Instruction, Program

_NUMERIC = "abs add clamp divide maximum minimum multiply negate remainder sign subtract"
_BITWISE = "and not or popcnt shift-left shift-right-arithmetic shift-right-logical xor"
_CHOOSING = "compare convert is-finite select"
_ROUNDING = "ceil floor round-nearest-afz round-nearest-even"
_POWERS = "cbrt exponential exponential-minus-one log log-plus-one logistic power rsqrt sqrt"
_ANGLES = "atan2 cosine erf sine tan tanh"
_ELEMENTWISE = frozenset(" ".join((_NUMERIC, _BITWISE, _CHOOSING, _ROUNDING, _POWERS, _ANGLES)).split())
_APPLYING = ("fusion", "reduce", "reduce-window", "sort")
_CONTROL = ("call", "while", "conditional")
_SMALL_CALL = 'xla_cpu_small_call="true"'
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_WINDOW = re.compile(r"window=\{size=([\dx]+)")
_SORTED_AXIS = re.compile(r"dimensions=\{(\d+)\}")


def operations(program: Program, runs: Mapping[str, int]) -> int:
    """Operations of all `runs` of instructions by name; names that the program lacks count nothing.

    Loops, conditionals and calls count nothing themselves: what they run has runs of its own. But XLA for CPU
    compiles some small loops into one call, of which a trace shows nothing else: it counts with all that it
    does. Raises ValueError if such a loop ran and the program does not say how often it turns.
    """
    count = _Count({instruction.name: instruction for instruction in program.instructions()}, program)
    return sum(times * count.of(name) for name, times in runs.items() if times and name in count.known)


class _Count(NamedTuple):
    """Counts operations of single instructions; `known` has them by name."""

    known: dict[str, Instruction]
    program: Program

    def of(self, name: str, *, is_hidden: bool = False) -> int:
        """Operations of one run; of a hidden one, of everything in it."""
        instruction = self.known[name]
        if instruction.opcode in _ELEMENTWISE:
            return instruction.result[0].elements
        is_hidden |= _SMALL_CALL in instruction.text
        if instruction.opcode not in (_CONTROL if is_hidden else ()) + _APPLYING:
            return 0
        applied = sum(
            self.of(inner.name, is_hidden=is_hidden)
            for called in instruction.called
            for inner in self.program.computations[called]
        )
        return applied * _times(instruction, self.known)


def _times(instruction: Instruction, known: dict[str, Instruction]) -> int:
    """How often one run of the instruction applies what it calls."""
    if instruction.opcode == "reduce":
        return known[instruction.operands[0]].result[0].elements
    if instruction.opcode == "reduce-window":
        (size,) = _WINDOW.findall(instruction.text)
        return instruction.result[0].elements * prod(int(length) for length in size.split("x"))
    if instruction.opcode == "sort":
        (axis,) = _SORTED_AXIS.findall(instruction.text)
        array = instruction.result[0]
        return array.elements * ceil(log2(max(2, array.shape[int(axis)])))
    if instruction.opcode == "while":
        turns = _TURNS.search(instruction.text)
        if turns is None:
            raise ValueError(
                f"{instruction.name} is not traced, and how often it turns is not in the program"
            )
        return int(turns.group(1))
    return 1
