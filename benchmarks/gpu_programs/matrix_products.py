"""The distinct matrix products of a program: XLA looks for the fastest way to do each, when it compiles it.

It takes two products for one where their texts are equal but for the names in them. The text is that of
all that a fusion calculates, slices of its operands included, or of a library's call with the types of its
operands.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from benchmarks.lib.hlo import Instruction, Program, inner_instructions, outside_fusions

_LIBRARY_CALL = re.compile(r'custom_call_target="__(cublas|cudnn)\$')
_SAYS_NOTHING = re.compile(r", (metadata|frontend_attributes)=\{[^}]*\}")
_BACKEND = re.compile(r", backend_config=.*$")
_PLACE = re.compile(r'"(operation_queue_id|device_type|force_earliest_schedule|reification_cost)":[^,}]*,?')
_NAME = re.compile(r"%[\w.\-]+")
_TYPE = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.*?) [a-z][a-z0-9\-]*\(")


def product_bodies(program: Program) -> Counter[str]:
    """The texts of a program's matrix products, and how many products have each."""
    return Counter(
        _body(one, by_name, program) for one, by_name in outside_fusions(program) if _is_product(one, program)
    )


def _is_product(one: Instruction, program: Program) -> bool:
    if one.opcode == "custom-call":
        return _LIBRARY_CALL.search(one.text) is not None
    return one.opcode == "dot" or (
        one.opcode == "fusion" and any(inner.opcode == "dot" for inner in inner_instructions(one, program))
    )


def _body(one: Instruction, by_name: Mapping[str, Instruction], program: Program) -> str:
    """The text of a product, with the types of its operands, and with numbers for names."""
    operands = [_type(by_name[name]) for name in one.operands if name in by_name]
    if one.opcode != "fusion":
        return _numbered([*operands, _PLACE.sub("", _SAYS_NOTHING.sub("", one.text))])
    lines = [_BACKEND.sub("", _SAYS_NOTHING.sub("", each.text)) for each in inner_instructions(one, program)]
    return _numbered([*operands, _type(one), *lines])


def _type(one: Instruction) -> str:
    match = _TYPE.match(one.text)
    return match.group(1) if match else ""


def _numbered(lines: Iterable[str]) -> str:
    """The lines with each name as the number of its first appearance."""
    numbers: dict[str, str] = {}
    return _NAME.sub(lambda name: numbers.setdefault(name.group(), f"%{len(numbers)}"), "\n".join(lines))
