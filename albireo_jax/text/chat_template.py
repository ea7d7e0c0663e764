"""Conversations to prompts, by the Jinja template that comes with a model.

A template is code from the model's files. It runs in Jinja's immutable sandbox and sees nothing but JSON
values. Its environment is the one that templates are written for: that of transformers'
`apply_chat_template`.
"""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Flag, auto
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from albireo_jax.text.messages import plain_json, read_conversation, read_tools

ConversationMessage = Mapping[str, Any]
Json = Any

_PROBE = "albireo probe"
_PROBE_CALLS = [{"id": "0" * 9, "type": "function", "function": {"name": "f", "arguments": {}}}]
_PRINTED = 40
"""Characters before the probe in which a list that is printed says its parts' type."""

_MAX_KINDS = 64
_MAX_RENDER_S = 10.0
"""Processor time of one rendering, and of one that only finds out what a template reads."""

_MAX_PROBE_S = 1.0
_FAST_S = 0.02

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
    ONE_PART = auto()
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

    @property
    def renders_fast(self) -> bool:
        """Whether the latest rendering of each template took little time; False before the first."""
        return bool(self._compiled) and all(compiled.was_fast for compiled in self._compiled.values())

    def render(
        self,
        messages: Sequence[ConversationMessage],
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
        short_ids = "[TOOL_CALLS]" in compiled.source  # as Mistral's templates insist on
        conversation = read_conversation(messages, short_ids=short_ids)
        if "messages" in variables:
            raise ValueError("messages cannot be a template variable")
        if continue_final_message:
            conversation[-1] = _marked_at_its_end(conversation[-1])
            add_generation_prompt = False
        text = compiled.render(
            [compiled.fit(message) for message in conversation],
            add_generation_prompt=add_generation_prompt is not False,
            tools=read_tools(tools),
            **({"documents": None} | self._special_tokens | plain_json(variables)),
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
        self.source = source
        self.was_fast = False
        self._special_tokens = special_tokens
        self._forms: dict[tuple[str, bool, bool], _Content] = {}  # by kind of message
        try:
            self._template = _environment().from_string(source, globals=dict(_FUNCTIONS))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the model's chat template is broken: {error}") from error

    def render(self, messages: list[Json], /, **variables: Json) -> str:
        """The template's text. Raises ValueError with the template's message."""
        return self._render(messages, variables, limit_s=_MAX_RENDER_S)

    def _render(self, messages: list[Json], variables: dict[str, Json], *, limit_s: float) -> str:
        started_s = time.thread_time()
        _deadline.at_s = started_s + limit_s
        try:
            return self._template.render(messages=messages, **variables)
        except _RENDER_ERRORS as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        finally:
            self.was_fast = time.thread_time() - started_s < _FAST_S

    def fit(self, message: dict[str, Json]) -> dict[str, Json]:
        """The message with its content in a form that the template reads of its role."""
        content = message["content"]
        reads = self._reads(message)
        if isinstance(content, list) and _Content.PARTS not in reads:
            content = "\n".join(part["text"] for part in content)
        if isinstance(content, str) and _Content.TEXT not in reads:
            content = [{"type": "text", "text": content}]
        return message | {"content": content}

    def _reads(self, message: dict[str, Json]) -> _Content:
        """Found out by rendering a message of its kind in each form; where it shows none, texts."""
        kind = message["role"], "tool_calls" in message, "name" in message
        if kind not in self._forms:
            like = _message_like(message)
            part, other = ({"type": "text", "text": f"{_PROBE} {which}"} for which in ("one", "other"))
            forms = {_Content.PARTS: [part, other], _Content.ONE_PART: [part], _Content.TEXT: _PROBE}
            reads = _Content(0)
            for form, content in forms.items():
                if self._shows_probe(like, content):
                    reads |= form
            if len(self._forms) >= _MAX_KINDS:
                self._forms.clear()  # roles are the callers' own
            self._forms[kind] = reads or _Content.TEXT
        return self._forms[kind]

    def _shows_probe(self, message: dict[str, Json], content: Json) -> bool:
        """Whether the template shows all of a content in its place, and not as it prints."""
        return any(self._shows_after(before, message | {"content": content}) for before in _openings(message))

    def _shows_after(self, before: list[Json], message: dict[str, Json]) -> bool:
        none: dict[str, Json] = {"add_generation_prompt": False, "tools": None, "documents": None}
        try:
            text = self._render([*before, message], none | dict(self._special_tokens), limit_s=_MAX_PROBE_S)
        except ValueError:
            return False
        content = message["content"]
        shown = [content] if isinstance(content, str) else [part["text"] for part in content]
        before_it = text[max(0, text.find(_PROBE) - _PRINTED) : max(0, text.find(_PROBE))]
        as_printed = "'type'" in before_it or '"type"' in before_it
        return all(probe in text for probe in shown) and not as_printed


def _message_like(message: dict[str, Json]) -> dict[str, Json]:
    """A message of the same kind, to try the template with."""
    like: dict[str, Json] = {"role": message["role"]}
    if "tool_calls" in message:
        like["tool_calls"] = _PROBE_CALLS
    if message["role"] == "tool":
        like["tool_call_id"] = _PROBE_CALLS[0]["id"]
    return like | ({"name": "f"} if "name" in message else {})


def _openings(message: dict[str, Json]) -> list[list[Json]]:
    """Conversations that a message may continue, the likeliest first."""
    user = {"role": "user", "content": "?"}
    if message["role"] == "tool":
        return [[user, {"role": "assistant", "content": "", "tool_calls": _PROBE_CALLS}], [user]]
    return [[], [user]] if message["role"] in ("user", "system") else [[user], []]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The tag's body, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Deadline(threading.local):
    """The time, on this thread's own clock, at which a rendering has taken too long."""

    at_s: float = math.inf


_deadline = _Deadline()


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which every call and every round of a loop looks at the time."""

    def tick(self) -> None:
        """Do nothing; each round of a loop in a template calls this, and so `call` looks at the time."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of a template. Raises TemplateError when the rendering's time is over."""
        if time.thread_time() > _deadline.at_s:
            raise jinja2.TemplateError(f"it takes more than {_MAX_RENDER_S:g} s of processor time")
        return super().call(context, obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(jinja2.nodes.For):
            tick = jinja2.nodes.EnvironmentAttribute("tick")
            loop.body.insert(0, jinja2.nodes.ExprStmt(jinja2.nodes.Call(tick, [], [], None, None)))
        return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _BoundedEnvironment(
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
