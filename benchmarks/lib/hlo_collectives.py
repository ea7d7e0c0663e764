"""The collectives of a compiled program, and their bytes, read from its text.

Bytes are those of a collective's result on one device: what it has to receive, its own share included. What
an algorithm puts on the wire for it may be more (a ring's all-reduce: 2 (t - 1) / t of its result).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.lib.hlo import Program

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BY_OPCODE = {opcode: kind for kind in _KINDS for opcode in (kind, f"{kind}-done")}
_CONTROL = ("conditional", "while")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective of a program: `name` is its instruction, `kind` its opcode.

    `within` names the conditionals and loops around it, the outermost first: a collective with none runs
    once, another as often as they let it. An asynchronous one counts once, where it ends.
    """

    name: str
    kind: str
    result_bytes: int
    within: tuple[str, ...]


def collectives(program: Program) -> tuple[Collective, ...]:
    """All collectives that the program may run, in the order of its text."""
    return tuple(_walk(program, program.entry, ()))


def _walk(program: Program, computation: str, within: tuple[str, ...]) -> Iterator[Collective]:
    for instruction in program.computations[computation]:
        if instruction.opcode in _BY_OPCODE:
            yield Collective(
                name=instruction.name,
                kind=_BY_OPCODE[instruction.opcode],
                result_bytes=sum(array.bytes for array in instruction.result),
                within=within,
            )
            continue  # what it calls adds up two numbers
        inner = (*within, instruction.name) if instruction.opcode in _CONTROL else within
        for called in instruction.called:
            yield from _walk(program, called, inner)
