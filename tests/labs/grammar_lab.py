"""Random schemas, and random answers that follow a mask."""

from typing import Any

import numpy as np

from albireo_jax.core.plan import Int32s
from albireo_jax.text.grammar.compiler import GrammarConstraint
from albireo_jax.text.tokenizer import Tokenizer

MAX_ANSWER = 800
_ENDING = frozenset(b'"}],:')


def token_ids(mask: Int32s) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


class Walker:
    """Draws answers at random, mostly of tokens that bring one to its end."""

    def __init__(self, tokenizer: Tokenizer, *, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self.eos = set(eos_token_ids)
        self.bytes = tokenizer.token_bytes(skip_special_tokens=False)
        spelled = [self.bytes[token_id] for token_id in range(vocab_size)]
        self._ends = np.array([bool(data) and _ENDING.issuperset(data) for data in spelled])

    def answer(self, constraint: GrammarConstraint, random: np.random.Generator) -> bytes:
        """The bytes of an answer up to its end-of-sequence id."""
        data = b""
        for _ in range(MAX_ANSWER):
            allowed = token_ids(constraint.mask())
            if self.eos.intersection(allowed.tolist()) and random.random() < 0.5:
                return data
            ending = allowed[self._ends[allowed]]
            from_ending = len(ending) and random.random() < 0.6
            token_id = int(random.choice(ending if from_ending else allowed))
            if token_id in self.eos:
                return data
            constraint.advance(token_id)
            data += self.bytes[token_id]
        raise AssertionError(f"no end after {MAX_ANSWER} tokens: {data[:500]!r}")


def draw_schema(random: np.random.Generator, *, depth: int = 3) -> dict[str, Any]:
    """A schema of one of several kinds, with others inside it."""
    leaves = [_string, _number, _integer, _enum, _const, _anything_simple, _pattern]
    nests = [_object, _object, _open_object, _array, _tuple, _any_of]
    kinds = leaves + 2 * nests if depth else leaves
    return kinds[random.integers(len(kinds))](random, depth - 1)


def _string(random: np.random.Generator, _: int) -> dict[str, Any]:
    low = int(random.integers(0, 5))
    return {"type": "string", "minLength": low, "maxLength": low + int(random.integers(0, 20))}


def _number(random: np.random.Generator, _: int) -> dict[str, Any]:
    low = float(random.integers(-50, 50))
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + 12.5}


def _integer(random: np.random.Generator, _: int) -> dict[str, Any]:
    low = int(random.integers(-500, 500))
    return {"type": "integer", "minimum": low, "maximum": low + int(random.integers(0, 1000))}


def _enum(random: np.random.Generator, _: int) -> dict[str, Any]:
    values: list[Any] = ["red", "green é", 'a "quoted" one', 3, -1.5, None, True]
    return {"enum": [values[i] for i in random.choice(len(values), size=3, replace=False)]}


def _const(random: np.random.Generator, _: int) -> dict[str, Any]:
    return {"const": [{"a": [1, "b"]}, "only this", 7, False][random.integers(4)]}


def _anything_simple(random: np.random.Generator, _: int) -> dict[str, Any]:
    return {"type": [["null", "boolean"], ["boolean", "string"], ["integer", "null"]][random.integers(3)]}


def _pattern(random: np.random.Generator, _: int) -> dict[str, Any]:
    patterns = ("^[A-Z]{2}-[0-9]{1,4}$", "^(ab|cd)*e?$", "^[^ ]{3,8}$")
    return {"type": "string", "pattern": patterns[random.integers(3)]}


def _object(random: np.random.Generator, depth: int) -> dict[str, Any]:
    names = [f"key {i}" if i % 2 else f"key_{i}" for i in range(random.integers(1, 5))]
    return {
        "type": "object",
        "properties": {name: draw_schema(random, depth=depth) for name in names},
        "required": [name for name in names if random.random() < 0.7],
        "additionalProperties": False,
    }


def _open_object(random: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": draw_schema(random, depth=depth)}


def _array(random: np.random.Generator, depth: int) -> dict[str, Any]:
    low = int(random.integers(0, 3))
    return {
        "type": "array",
        "items": draw_schema(random, depth=depth),
        "minItems": low,
        "maxItems": low + int(random.integers(1, 4)),
    }


def _tuple(random: np.random.Generator, depth: int) -> dict[str, Any]:
    items = [draw_schema(random, depth=depth) for _ in range(random.integers(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(random: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [draw_schema(random, depth=depth) for _ in range(2)]}


def linked(schema: dict[str, Any]) -> dict[str, Any]:
    """A linked list of what `schema` describes, by a reference to itself."""
    node = {
        "type": "object",
        "properties": {"value": schema, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}
