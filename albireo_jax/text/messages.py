"""Conversations as callers write them, brought into the one form that chat templates read.

Callers replay what they got: messages without content, calls without ids, arguments as objects or broken
JSON. All of it becomes a role, a content, and calls whose arguments are objects.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from albireo_jax.text.answers.json_repair import repaired_object
from albireo_jax.text.answers.json_scanner import MAX_JSON_DEPTH

Json = Any

_SPEAKERS = frozenset(("system", "developer", "user"))
"""Roles whose messages say something."""

_KNOWN_ROLES = _SPEAKERS | {"assistant", "tool"}
_OF_ANSWERS = frozenset(("refusal", "annotations", "audio", "function_call", "token_ids", "reasoning"))
"""Fields of an answer that say nothing to a template; `reasoning` goes by `reasoning_content`."""

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and where the text is."""

_NO_PARAMETERS = {"type": "object", "properties": {}}
_SHORT_ID = 9


def read_conversation(messages: Any, *, short_ids: bool = False) -> list[dict[str, Json]]:
    """Messages as templates read them. Raises ValueError that names the message.

    A developer message is a system message. With `short_ids` calls are named by nine letters and digits.
    """
    conversation = [
        _message(f"messages[{i}]", message) for i, message in enumerate(_objects("messages", messages))
    ]
    if not conversation:
        raise ValueError("messages is empty, at least 1 message is needed")
    _name_calls(conversation, short_ids=short_ids)
    return conversation


def read_tools(tools: Any) -> list[dict[str, Json]] | None:
    """Tools as templates read them, None if there are none; a function without parameters takes none."""
    read: list[dict[str, Json]] = []
    for tool in _objects("tools", tools or []):
        function = tool.get("function")
        if isinstance(function, dict):
            given = {key: value for key, value in function.items() if value is not None and key != "strict"}
            tool = {
                "type": "function",
                **tool,
                "function": given | {"parameters": given.get("parameters", _NO_PARAMETERS)},
            }
        read.append(tool)
    return read or None


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message's content."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(map(check_part, content))


def short_call_id(id: str) -> str:
    """The last nine letters and digits of a call's name, all that Mistral's templates accept."""
    return "".join(filter(str.isalnum, id))[-_SHORT_ID:].rjust(_SHORT_ID, "0")


def check_message(role: str, content: object, *, calls: bool) -> None:
    """Raise ValueError for what does not belong to a role, and for nobody's silence but the assistant's."""
    if calls and role in _KNOWN_ROLES - {"assistant"}:
        raise ValueError(f"tool_calls are for the role assistant, not {role}")
    if content is None and role in _SPEAKERS:
        raise ValueError(f"content is required for the role {role}")


def check_part(part: Json) -> str:
    """The text of a part of a message's content. Raises ValueError for other parts, by their type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError(f'{{"type": "text", "text": …}} is wanted, got {part!r:.80}')
    if kind not in _TEXT_PARTS:
        raise ValueError(f"the type {kind!r:.80} is not supported, only text is")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise ValueError(f"{_TEXT_PARTS[kind]} is required, a text, got {text!r:.80}")
    return text


def plain_json(value: Any, depth: int = 0) -> Json:
    """The value rebuilt from JSON types, so that a template can call nothing but their methods."""
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"messages and tools may be nested {MAX_JSON_DEPTH} deep at most")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain_json(item, depth + 1) for item in value]
    raise ValueError(f"{value!r:.80} of type {type(value).__name__} is not JSON")


def _objects(name: str, values: Any) -> list[dict[str, Json]]:
    plain = plain_json(values)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise ValueError(f"{name} must be a list of objects, got {values!r:.200}")
    return plain


def _message(where: str, given: dict[str, Json]) -> dict[str, Json]:
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} needs a role, got {role!r:.80}")
    role = "system" if role == "developer" else role
    for name in ("audio", "function_call"):
        if given.get(name):
            raise ValueError(f"{where}: {name} is not supported")
    content, calls = given.get("content"), given.get("tool_calls")
    try:
        check_message(role, content, calls=bool(calls))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if content is None and role == "assistant":
        content = given.get("refusal")
    others = {name: value for name, value in given.items() if value is not None and name not in _OF_ANSWERS}
    message = others | {"role": role, "content": _content(f"{where}.content", content)}
    reasoning = given.get("reasoning_content") or given.get("reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    else:
        message.pop("tool_calls", None)
    return message


def _content(where: str, content: Json) -> str | list[dict[str, Json]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return [_part(f"{where}[{i}]", part) for i, part in enumerate(content)]
    raise ValueError(f"{where} must be a text or a list of parts, got {content!r:.80}")


def _part(where: str, part: Json) -> dict[str, Json]:
    """A part that is text; a refusal, which is what the assistant said instead, counts as such."""
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    try:
        return {"type": "text", "text": check_part(part)}
    except ValueError as error:
        raise ValueError(f"{where} must be a text part: {error}") from error


def _calls(where: str, calls: Json) -> list[dict[str, Json]]:
    if not isinstance(calls, list):
        raise ValueError(f"{where} must be a list of calls, got {calls!r:.80}")
    return [_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _call(where: str, call: Json) -> dict[str, Json]:
    """A call whose arguments, JSON text in the OpenAI API, are the object that templates expect."""
    if not isinstance(call, dict):
        raise ValueError(f"{where} must be an object, got {call!r:.80}")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"{where}.type {call['type']!r:.80} is not supported, only function is")
    function = call.get("function")
    if not isinstance(function, dict):
        raise ValueError(
            f"{where}.function is required, an object with name and arguments, got {function!r:.80}"
        )
    name, id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.function.name is required, a text, got {name!r:.80}")
    if id is not None and not isinstance(id, str):
        raise ValueError(f"{where}.id must be a text, got {id!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str | None):
        arguments = read_arguments(arguments or "")
    elif not isinstance(arguments, dict):
        raise ValueError(f"{where}.function.arguments must be JSON text or an object, got {arguments!r:.80}")
    return {**call, "id": id or "", "type": "function", "function": {**function, "arguments": arguments}}


def read_arguments(text: str) -> Json:
    """The object that a call's arguments are: mended or completed if they broke off; else the text itself.

    Blank text and null are no arguments.
    """
    text = text.strip()
    if text in ("", "null"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = repaired_object(text)
    return value if isinstance(value, dict) else text


def _name_calls(conversation: Iterable[dict[str, Json]], *, short_ids: bool) -> None:
    """Give every call a name, and every result that has none the name of the first call without a result."""
    waiting: list[str] = []
    num_calls = 0
    for i, message in enumerate(conversation):
        for call in message.get("tool_calls", ()):
            num_calls += 1
            id = call["id"] or f"call_{num_calls}"
            call["id"] = short_call_id(id) if short_ids else id
            waiting.append(call["id"])
        if message["role"] != "tool":
            continue
        id = message.get("tool_call_id") or (waiting[0] if waiting else None)
        if id is None:
            continue
        if not isinstance(id, str):
            raise ValueError(f"messages[{i}].tool_call_id must be a text, got {id!r:.80}")
        message["tool_call_id"] = short_call_id(id) if short_ids else id
        if message["tool_call_id"] in waiting:
            waiting.remove(message["tool_call_id"])
