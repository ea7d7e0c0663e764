"""What an answer must look like when a call is demanded, or when an answer is constrained after reasoning.

Grammars are in the notation of Lark as llguidance reads it: `%json {…}` stands for what a schema allows,
`<[7]>` for the token 7. A marker may be a token of its own, even a special one, which no text spells, so
a grammar names both.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llguidance

from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.engine.reasoning import CLOSE, OPEN, Thinking
from albireo_jax.engine.tool_formats import AnswerFormat, ToolFormat

TokenId = Callable[[str], int | None]
"""Id of a token by its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that may be called; `parameters` is the JSON schema of its arguments, as text."""

    name: str
    parameters: str


def calls_grammar(
    format: AnswerFormat,
    functions: Sequence[Function],
    *,
    parallel: bool,
    token_id: TokenId,
    marked: bool = False,
) -> StructuredOutput:
    """Nothing but calls of `functions`, one or (if `parallel`) more, written as the model was taught.

    With `marked` they begin with a marker also where the model may do without one. Raises ValueError if the
    model was taught no format that is known.
    """

    def marker(text: str) -> str:
        return _marker(text, token_id)

    if format.tools is ToolFormat.HERMES:
        opening, closing = marker("<tool_call>"), marker("</tool_call>")
        calls = [
            f"{opening} {_object_call(function, 'arguments', before=_NEWLINE, after=_NEWLINE)} {closing}"
            for function in functions
        ]
        start = _separated("call", '"\\n"', parallel=parallel)
    elif format.tools is ToolFormat.LLAMA3_JSON:
        calls = [_object_call(function, "parameters") for function in functions]
        begin = marker("<|python_tag|>") if marked else ""
        start = f"{begin} {_separated('call', _SEMICOLON, parallel=parallel)}"
    elif format.tools is ToolFormat.MISTRAL and format.names_first:
        begin, middle = marker("[TOOL_CALLS]"), marker("[ARGS]")
        calls = [
            f"{begin} {_quoted(function.name)} {middle} %json {function.parameters}" for function in functions
        ]
        start = "call+" if parallel else "call"
    elif format.tools is ToolFormat.MISTRAL:
        calls = [_object_call(function, "arguments") for function in functions]
        start = f'{marker("[TOOL_CALLS]")} "[" {_separated("call", _COMMA, parallel=parallel)} "]"'
    else:
        raise ValueError("tools are not supported: how the model writes tool calls is not known")
    rules = [f"call_{i}: {call}" for i, call in enumerate(calls)]
    names = " | ".join(f"call_{i}" for i in range(len(calls)))
    return _grammar(f"start: {start}", f"call: {names}", *rules)


def either(first: StructuredOutput, second: StructuredOutput) -> StructuredOutput:
    """What one of two constraints allows."""
    return _grammar("start: first | second", f"first: {_body(first)}", f"second: {_body(second)}")


def after_reasoning(
    structured: StructuredOutput, thinking: Thinking, *, token_id: TokenId
) -> StructuredOutput:
    """The constraint on what follows the reasoning, which is free."""
    if thinking is Thinking.OVER:
        return structured
    opening, closing = _marker(OPEN, token_id), token_id(CLOSE)
    by_token = "" if closing is None else f" | /(.|\\n)*/ <[{closing}]>"
    reasoning = f"{opening}? thoughts" if thinking is Thinking.BEGUN else f"({opening} thoughts)?"
    return _grammar(
        f"start: {reasoning} {_body(structured)}",
        f"thoughts: (spelled{by_token}) /[ \\t\\n\\r]*/",
        "spelled[lazy]: /(.|\\n)*<\\/think>/",
    )


_NEWLINE, _COMMA, _SEMICOLON = "\n", '", "', '"; "'


def _grammar(*rules: str) -> StructuredOutput:
    return StructuredOutput(kind=StructureKind.GRAMMAR, text="".join(f"{rule}\n" for rule in rules))


def _separated(rule: str, separator: str, *, parallel: bool) -> str:
    return f"{rule} ({separator} {rule})*" if parallel else rule


def _object_call(function: Function, key: str, *, before: str = "", after: str = "") -> str:
    opening = f'{before}{{"name": {json.dumps(function.name)}, "{key}": '
    return f"{_quoted(opening)} %json {function.parameters} {_quoted('}' + after)}"


def _marker(text: str, token_id: TokenId) -> str:
    token = token_id(text)
    return _quoted(text) if token is None else f"({_quoted(text)} | <[{token}]>)"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _body(structured: StructuredOutput) -> str:
    """What a structured output allows, as a part of a rule."""
    if structured.kind is StructureKind.JSON_OBJECT:
        return '%json {"type": "object"}'
    if structured.kind is StructureKind.JSON_SCHEMA:
        return f"%json {structured.text}"
    if structured.kind is StructureKind.REGEX:
        return f"/{llguidance.regex_to_lark(structured.text)}/"
    if structured.kind is StructureKind.CHOICE:
        return f"({' | '.join(map(_quoted, structured.choices))})"
    return f"%lark {{\n{structured.text}\n}}"
