"""Conversations to prompts, by the Jinja template that comes with a model.

A template is code from the model's files. It runs in Jinja's immutable sandbox and sees nothing but JSON
values. Its environment is the one that templates are written for: that of transformers'
`apply_chat_template`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Flag, auto
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
Json = Any

_MAX_NESTING = 64
_PROBE = "albireo probe"
_MARK = "ALBIREO_CONTINUES_HERE "
"""Where a message that is to be continued ends; the space tells whether the template strips spaces there."""

_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise: its own errors, and those of the Python operations that it asks for."""


class _Content(Flag):
    """Forms of a message's content that a template can read."""

    TEXT = auto()
    PARTS = auto()


class ChatTemplate:
    """A model's chat templates by name, ready to render conversations.

    `special_tokens` are variables of the template: `bos_token`, `eos_token`, ….
    """

    def __init__(self, sources: Mapping[str, str], *, special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, _Compiled] = {}

    @property
    def exists(self) -> bool:
        """Whether the model has a template at all."""
        return bool(self._sources)

    @property
    def source(self) -> str:
        """The template that is taken with tools; empty if there is none."""
        return self._sources.get("tool_use", self._sources.get("default", ""))

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as one text, ending where the assistant begins if `add_generation_prompt`.

        With `continue_final_message` it ends inside the last message, where its text ends;
        `add_generation_prompt` is then False by default, otherwise True. A message has a `role` and a
        `content`: a text, or a list of `{"type": "text", "text": …}` parts, which are joined by newlines
        where the template wants a text. `tools` are OpenAI function schemas; with them the template named
        `tool_use` is taken where there is one. `variables` are passed on.
        Raises ValueError: no template, bad messages, or whatever the template objects to.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: "
                "the last message is continued, or a new one begins"
            )
        compiled = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        conversation = [
            _message(i, message) for i, message in enumerate(_list_of_dicts("messages", messages))
        ]
        if not conversation:
            raise ValueError("messages is empty, at least 1 message is needed")
        if "messages" in variables:
            raise ValueError("messages cannot be a template variable")
        if continue_final_message:
            conversation[-1] = _marked_at_its_end(conversation[-1])
            add_generation_prompt = False
        text = compiled.render(
            [compiled.fit(message) for message in conversation],
            add_generation_prompt=add_generation_prompt is not False,
            tools=None if not tools else _list_of_dicts("tools", tools),
            **({"documents": None} | self._special_tokens | _plain(variables)),
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _template(self, name: str) -> "_Compiled":
        if not self._sources:
            raise ValueError("the model has no chat template; give it a prompt instead of messages")
        if name not in self._sources:
            raise ValueError(f"the model has no default chat template; it has {sorted(self._sources)}")
        if name not in self._compiled:
            self._compiled[name] = _Compiled(self._sources[name], self._special_tokens)
        return self._compiled[name]


class _Compiled:
    """One template and the forms of content that it reads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source, globals=dict(_FUNCTIONS))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: list[Json], /, **variables: Json) -> str:
        """The template's text. Raises ValueError with the template's message."""
        try:
            return self._template.render(messages=messages, **variables)
        except _RENDER_ERRORS as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def fit(self, message: dict[str, Json]) -> dict[str, Json]:
        """The message with its content in a form that the template reads."""
        content = message["content"]
        if isinstance(content, list) and _Content.PARTS not in self._reads:
            return message | {"content": "\n".join(part["text"] for part in content)}
        if isinstance(content, str) and _Content.TEXT not in self._reads:
            return message | {"content": [{"type": "text", "text": content}]}
        return message

    @cached_property
    def _reads(self) -> _Content:
        """Found out by rendering one message in either form; a template that reads neither gets texts."""
        parts = self._shows_probe([{"type": "text", "text": _PROBE}])
        text = self._shows_probe(_PROBE)
        if parts:
            return _Content.PARTS | _Content.TEXT if text else _Content.PARTS
        return _Content.TEXT

    def _shows_probe(self, content: Json) -> bool:
        try:
            text = self.render(
                [{"role": "user", "content": content}],
                add_generation_prompt=False,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except ValueError:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text  # not the list as it prints


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The tag's body, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(
    value: Json,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


_FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


def _message(index: int, message: dict[str, Json]) -> dict[str, Json]:
    """A message checked: a role, and content that is a text or a list of text parts."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"messages[{index}] needs a role, got {role!r}")
    content = message.get("content")
    if content is None:  # as the OpenAI API has it beside tool calls
        content = ""
    if isinstance(content, list):
        content = [_part(f"messages[{index}].content[{i}]", part) for i, part in enumerate(content)]
    elif not isinstance(content, str):
        raise ValueError(f"messages[{index}].content must be a text or a list of parts, got {content!r}")
    message = message | {"content": content}
    if message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _marked_at_its_end(message: dict[str, Json]) -> dict[str, Json]:
    """The message with a mark after its text, after the last of its parts."""
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": content + _MARK}
    if not content:
        raise ValueError("continue_final_message needs a text to continue, the last message has no parts")
    return message | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"] + _MARK}]}


def _cut_at_mark(text: str) -> str:
    """A rendered conversation up to the mark, as transformers cuts it."""
    at = text.rfind(_MARK.rstrip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template does not show the last message's text")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _part(where: str, part: Json) -> dict[str, Json]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where} must be {{"type": "text", "text": …}}, got {part!r}')
    return part


def _tool_call(call: Json) -> Json:
    """A tool call whose arguments, JSON text in the OpenAI API, are the object that templates expect."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (
        TypeError,
        KeyError,
        ValueError,
        RecursionError,
    ):  # an object already, or nothing that can be read: as it is
        return call
    return call | {"function": call["function"] | {"arguments": arguments}}


def _list_of_dicts(name: str, values: Any) -> list[dict[str, Json]]:
    plain = _plain(values)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise ValueError(f"{name} must be a list of objects, got {values!r}")
    return plain


def _plain(value: Any, depth: int = 0) -> Json:
    """The value rebuilt from JSON types, so that a template can call nothing but their methods."""
    if depth > _MAX_NESTING:
        raise ValueError(f"messages and tools may be nested {_MAX_NESTING} deep at most")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, depth + 1) for item in value]
    raise ValueError(f"{value!r} of type {type(value).__name__} is not JSON")
