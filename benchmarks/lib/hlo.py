"""The text of compiled programs, read into instructions: XLA shows what it made of a program no other way."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class ArrayType:
    """Element type, as XLA writes it (`f32`, `pred`), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """1 for a scalar."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """As if stored on its own; 0 for a token, which holds nothing."""
        if self.dtype == "pred":
            return self.elements
        bits = _BITS.search(self.dtype)
        return (self.elements * int(bits.group()) + 7) // 8 if bits else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One line of a program. `result` has the arrays of a tuple one by one; `text` is all of the line."""

    name: str
    opcode: str
    result: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Named computations, each a list of instructions in their order; names are unique in a program."""

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]

    def instructions(self) -> Iterator[Instruction]:
        """The instructions of every computation."""
        for computation in self.computations.values():
            yield from computation


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises ValueError if it has no entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if opening := _COMPUTATION.match(line):
            current = opening.group(2)
            computations[current] = []
            entry = current if opening.group(1) else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_instruction(match, line))
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not a compiled program")
    return Program(entry=entry, computations={name: tuple(lines) for name, lines in computations.items()})


def _instruction(match: re.Match[str], line: str) -> Instruction:
    name, result, opcode = match.groups()
    end = _closing(line, match.end())
    attributes = line[end:]
    called = _CALLED.findall(attributes)
    for branches in _BRANCHES.findall(attributes):
        called += [branch.strip().removeprefix("%") for branch in branches.split(",")]
    arrays = [
        ArrayType(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(result)
    ]
    return Instruction(
        name=name,
        opcode=opcode,
        result=tuple(arrays),
        operands=tuple(_OPERAND.findall(line[match.end() : end])),
        called=tuple(called),
        text=line.strip(),
    )


def _closing(line: str, start: int) -> int:
    """Where the parenthesis that was opened before `start` closes; the line's end if it does not."""
    depth = 1
    for index in range(start, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if depth == 0:
            return index
    return len(line)


def outside_fusions(program: Program) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
    """Instructions that have a result of their own in memory, each with all of its computation by name."""
    fused = {name for one in program.instructions() if one.opcode == "fusion" for name in one.called}
    for computation, instructions in program.computations.items():
        if computation in fused:
            continue
        by_name = {one.name: one for one in instructions}
        for one in instructions:
            yield one, by_name


def inner_instructions(one: Instruction, program: Program) -> Iterator[Instruction]:
    """The instructions of what one calls, and of what these call."""
    for name in one.called:
        for inner in program.computations[name]:
            yield inner
            yield from inner_instructions(inner, program)
