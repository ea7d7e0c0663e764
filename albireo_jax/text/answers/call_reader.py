"""Calls as JSON objects, read from a text that comes in pieces: what all formats of tool calls share.

A call is announced once its name and the brace that opens its arguments are known; from then on its
arguments are passed on as they come, mended where they are not strict JSON, and are at any time the
beginning of a JSON object. Text that never gets that far is content. An announced call whose arguments
break ends there, and its end says so and brings the call as it was written; content goes on with the
character that does not fit.
"""

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from albireo_jax.text.answers.incremental_parser import IncrementalParser, Reading
from albireo_jax.text.answers.json_repair import JsonRepair

_MAX_MEMBERS = 16
_NAME_CHARACTERS = re.compile(r"[\w.:/-]*+")
_CLOSING_BRACKETS = re.compile(r"[}\]]*+")
_LANGUAGE = re.compile(r"[A-Za-z_]*+")
_FENCE = "```"
_MAX_NAME = 256
_NO_ARGUMENTS = frozenset(("null", "[]"))
_ARGUMENTS = ("arguments", "parameters")
_BARE_MEMBERS = frozenset(("name", "type", "id", "function", *_ARGUMENTS))
"""Members of a call that no marker announces; an object that begins with others is content."""


class ContentText(NamedTuple):
    """More of what the model says to the user."""

    text: str


class CallBegun(NamedTuple):
    """Call number `call` of the answer, of the function `name`; its arguments follow."""

    call: int
    id: str
    name: str


class ArgumentsText(NamedTuple):
    """More of the JSON text of a call's arguments."""

    call: int
    text: str


class CallEnded(NamedTuple):
    """Nothing more comes of a call.

    If its arguments are no JSON object, `broken` is the call as it was written, up to where it broke or to
    the answer's end: `cut_off` tells the latter.
    """

    call: int
    broken: str = ""
    cut_off: bool = False


ToolEvent = ContentText | CallBegun | ArgumentsText | CallEnded


@dataclass(slots=True, kw_only=True)
class _Call:
    """A call that is being read. It has begun when its name is known and its arguments are open."""

    index: int
    is_bare: bool = False
    is_typed: bool = False  # it says itself that it calls a function
    is_nested: bool = False  # name and arguments are in an object of their own
    name: str | None = None
    has_arguments: bool = False
    early: list[str] = field(default_factory=list[str])  # arguments that came before the name
    written: list[str] = field(default_factory=list[str])  # all that was read since it began
    begun: bool = False
    broken: bool = False


class CallReader(IncrementalParser):
    """The reader that all tool-call formats share: it reads calls as JSON objects."""

    def __init__(self, events: list[ToolEvent], *, new_id: Callable[[], str], max_calls: int) -> None:
        super().__init__(self._say_content)
        self._events = events
        self._new_id = new_id
        self._max_calls = max_calls
        self._num_attempts = 0
        self._num_calls = 0
        self._after_call = False  # white space and syntax there are not content

    def next_marker(self, *markers: str) -> Generator[None, None, str]:
        """Say what comes before a marker, which is returned; "" at the text's end, all of it said."""
        if self._num_attempts < self._max_calls:
            marker = yield from self.until(*markers)
            if marker:
                return marker
            self.settle()
        yield from self.rest()
        return ""

    def next_line(self, beginnings: str, marker: str) -> Generator[None, None, str]:
        """As `next_marker`, also for a line that begins with one of `beginnings`."""
        if self._num_attempts < self._max_calls:
            found = yield from self.until_line(beginnings, marker)
            if found:
                return found
            self.settle()
        yield from self.rest()
        return ""

    def calls(self, *, is_bare: bool = False) -> Reading:
        """Read calls one after the other, perhaps in a list or a fence; whether there is one.

        Brackets too many are syntax, and so are separators and the fence's end. With `is_bare` no marker came
        before: only what must be a call is one.
        """
        yield from self.spaces()
        if self.ended:
            self.settle()
            return False
        fenced = yield from self._fence()
        yield from self.literal("[")
        yield from self.spaces()
        found = False
        while True:
            call = yield from self._object_call(is_bare=is_bare)
            if not call.begun or call.broken:
                break
            found = True
            if not (yield from self._another(fenced=fenced)):
                break
        return found

    def named_call(self, *, is_first: bool) -> Reading:
        """Read `name[ARGS]{…}`, perhaps with `[CALL_ID]id` after the name; whether it is a call.

        Only the first may leave out `[ARGS]`.
        """
        call = self._begin(is_bare=False)
        name: list[str] = []

        def take(piece: str) -> None:
            name.append(piece)
            self.hold(piece)

        yield from self.run(_NAME_CHARACTERS, take)
        if (yield from self.literal("[CALL_ID]")):
            yield from self.run(_NAME_CHARACTERS, self.hold)
        yield from self.spaces()
        marked = yield from self.literal("[ARGS]")
        yield from self.spaces()
        if is_function_name("".join(name)) and (marked or is_first):
            call.name = "".join(name)
            if marked and (yield from self.next_is("[")):  # the next call, or something else
                self._give_arguments(call, "{}")
            elif marked or (yield from self.next_is("{")):
                yield from self._arguments(call)
        self._end(call)
        return call.begun and not call.broken

    def settle(self) -> None:
        """Say what is held; at the text's end, after a call, it is no content."""
        if self._after_call and self.ended:
            self.drop()
        else:
            self.release()

    def _begin(self, *, is_bare: bool) -> _Call:
        self._num_attempts += 1
        return _Call(index=self._num_calls, is_bare=is_bare)

    def _object_call(self, *, is_bare: bool) -> Generator[None, None, _Call]:
        """Read a call: an object with a name and arguments (or parameters), in whatever order.

        Of one that has begun nothing is held but what came after its arguments.
        """
        call = self._begin(is_bare=is_bare)
        whole = self._num_attempts <= self._max_calls and (yield from self.literal("{"))
        if whole and (yield from self._members(call)):
            if not call.has_arguments and call.name is not None and (call.is_typed or not is_bare):
                self._give_arguments(call, "{}")
            if call.begun:
                self.drop()
        self._end(call)
        return call

    def _end(self, call: _Call) -> None:
        """Note the end of a call, if it began; say what is held of one that did not."""
        if call.begun:
            self._after_call = True
            written = "".join(call.written) if call.broken else ""
            self._events.append(CallEnded(call.index, written, call.broken and self.ended))
        else:
            self.release()

    def _fence(self) -> Reading:
        """Read the beginning of a fenced block."""
        if not (yield from self.literal(_FENCE)):
            return False
        yield from self.run(_LANGUAGE, self.hold)
        yield from self.spaces()
        return True

    def _another(self, *, fenced: bool) -> Reading:
        """Read what stands after a call; whether another one may begin then."""
        while True:
            yield from self.spaces()
            closed: list[str] = []
            yield from self.run(_CLOSING_BRACKETS, closed.append)
            if not any(closed):
                break
            self.drop()
        if fenced and (yield from self.literal(_FENCE)):
            self.drop()
            yield from self.spaces()
        if (yield from self.literal(",")) or (yield from self.literal(";")):
            yield from self.spaces()
        if (yield from self.next_is("{")):
            return True
        if self.ended:
            self.drop()
        return False

    def _members(self, call: _Call) -> Reading:
        """Read an object's members and its closing brace; whether they are as a call has them."""
        yield from self.spaces()
        for _ in range(_MAX_MEMBERS):
            key = yield from self._string()
            yield from self.spaces()
            if key is None or not (yield from self.literal(":")):
                return False
            yield from self.spaces()
            if not (yield from self._member(call, key)):
                return False
            yield from self.spaces()
            if not (yield from self.literal(",")):
                return (yield from self.literal("}"))
            yield from self.spaces()
            if (yield from self.literal("}")):
                return True
        return False

    def _member(self, call: _Call, key: str) -> Reading:
        if call.is_bare and not call.begun and key not in _BARE_MEMBERS:
            return False
        if key == "name" or (key == "function" and not (yield from self.next_is("{"))):
            name = yield from self._string()
            if name is None or call.name is not None or not is_function_name(name):
                return False
            call.name = name
            self._announce(call)
            return True
        if key == "function" and not call.is_nested:
            call.is_typed = call.is_nested = True
            yield from self.literal("{")
            return (yield from self._members(call))
        if key in _ARGUMENTS and not call.has_arguments:
            return (yield from self._arguments(call))
        value: list[str] = []
        whole = yield from self._held_value(value.append)
        call.is_typed |= key == "type" and "".join(value) == '"function"'
        return whole

    def _arguments(self, call: _Call) -> Reading:
        """Read a call's arguments: an object, JSON text of one, or null for none."""
        if not (yield from self.next_is("{")):
            pieces: list[str] = []
            if not (yield from self._held_value(pieces.append)):
                return False
            arguments = _unwrapped("".join(pieces))
            if arguments is not None:
                self._give_arguments(call, arguments)
            return arguments is not None
        call.has_arguments = True
        self._announce(call)

        def take(written: str, strict: str) -> None:
            if not call.begun:
                self.hold(written)
                call.early.append(strict)
                return
            call.written.append(written)
            if strict:
                self._events.append(ArgumentsText(call.index, strict))

        whole = yield from self.value(take)
        call.broken = call.begun and not whole
        return whole

    def _give_arguments(self, call: _Call, arguments: str) -> None:
        """Give a call all of its arguments at once."""
        call.has_arguments = True
        call.early.append(arguments)
        self._announce(call)

    def _string(self) -> Generator[None, None, str | None]:
        """Read and hold a string; None for anything else."""
        pieces: list[str] = []
        is_string = (yield from self.next_is("\"'")) and (yield from self._held_value(pieces.append))
        return json.loads("".join(pieces)) if is_string else None

    def _held_value(self, take: Callable[[str], None]) -> Reading:
        """Read and hold a value; `take` gets it as strict JSON."""

        def hold(written: str, strict: str) -> None:
            self.hold(written)
            take(strict)

        return (yield from self.value(hold))

    def _announce(self, call: _Call) -> None:
        if call.name is None or not call.has_arguments:
            return
        call.begun = True
        call.written.append(self.drop())
        self._num_calls += 1
        self._events.append(CallBegun(call.index, self._new_id(), call.name))
        if call.early:
            self._events.append(ArgumentsText(call.index, "".join(call.early)))

    def _say_content(self, text: str) -> None:
        self._after_call = False
        self._events.append(ContentText(text))


def is_function_name(name: str) -> bool:
    """Whether a function may be called so: letters, digits and `_ - . : /`, 256 of them at most."""
    return 0 < len(name) <= _MAX_NAME and _NAME_CHARACTERS.fullmatch(name) is not None


def _unwrapped(value: str) -> str | None:
    """The arguments that a JSON value stands for which is no object; None if it stands for none."""
    if value in _NO_ARGUMENTS:
        return "{}"
    if not value.startswith('"'):
        return None
    text = json.loads(value).strip()
    if text in _NO_ARGUMENTS or not text:
        return "{}"
    mender = JsonRepair()
    whole = text.startswith("{") and mender.mend(text, 0) == len(text) and mender.done
    return mender.take() if whole else None
