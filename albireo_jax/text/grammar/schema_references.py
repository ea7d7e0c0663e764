"""The references of a JSON schema: where they lead, and names for their targets that need no escapes."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any] | bool

_MAX_FOLLOWED = 32
_ANCHORS = ("$anchor", "$dynamicAnchor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A schema that is referred to, under the name that it gets."""

    name: str
    schema: Any


class References:
    """Resolves the references of a document, all of which must lead into it.

    `$dynamicRef` and `$recursiveRef` are followed as if they were `$ref`.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._named: dict[str, Any] | None = None  # by anchor and id; made when the first is asked for
        self._targets: list[Target] = []
        self._by_schema: dict[int, Target] = {}
        self._num_written = 0

    def written(self, reference: Any) -> str:
        """The reference to what `reference` leads to, as it is in the document that is written.

        Raises ValueError if it leads nowhere, or out of the document.
        """
        schema = self._resolve(reference)
        target = self._by_schema.get(id(schema)) if isinstance(schema, dict) else None
        if target is None:
            target = Target(name=f"d{len(self._targets)}", schema=schema)
            self._targets.append(target)
            self._by_schema[id(schema)] = target
        return f"#/$defs/{target.name}"

    def next_unwritten(self) -> Target | None:
        """The next target that was not given yet."""
        if self._num_written == len(self._targets):
            return None
        self._num_written += 1
        return self._targets[self._num_written - 1]

    def followed(self, schema: Any) -> Any:
        """`schema` itself, or the schema that its `$ref` leads to."""
        for _ in range(_MAX_FOLLOWED):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._resolve(schema["$ref"])
        return schema

    def _resolve(self, reference: Any) -> Any:
        if not isinstance(reference, str):
            raise ValueError(f"a reference is a string, got {reference!r:.80}")
        base, _, fragment = reference.partition("#")
        schema: Any = self._root
        if base and base not in (self._root.get("$id"), self._root.get("id")):
            schema = self._by_name(base, reference)
        if fragment and not fragment.startswith("/"):
            return self._by_name(f"#{fragment}", reference)
        for part in fragment.split("/")[1:]:
            schema = _child(schema, unquote(part), part)
            if schema is None:
                raise ValueError(f"the reference {reference!r:.200}: {fragment!r:.200} does not exist")
        return schema

    def _by_name(self, name: str, reference: str) -> Any:
        if self._named is None:
            self._named = _named_schemas(self._root)
        if name not in self._named:
            raise ValueError(f"the reference {reference!r:.200} leads out of the schema, or nowhere")
        return self._named[name]


def _child(schema: Any, *spellings: str) -> Any:
    """The member that one of the spellings of a part of a JSON pointer names; None if there is none."""
    for spelling in spellings:
        name = spelling.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict) and name in schema:
            return schema[name]
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            return schema[int(name)]
    return None


def _named_schemas(root: dict[str, Any]) -> dict[str, Any]:
    """Schemas by their ids, and by their anchors behind `#`; the first of a name counts."""
    named: dict[str, Any] = {}
    level: list[Any] = [root]
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, list):
                inner += value
            elif isinstance(value, dict):
                inner += value.values()
                names = [f"#{value[word]}" for word in _ANCHORS if isinstance(value.get(word), str)]
                names += [value[word] for word in ("$id", "id") if isinstance(value.get(word), str)]
                for name in names:
                    named.setdefault(name, value)
        level = inner
    return named
