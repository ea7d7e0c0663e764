"""Constraints for answers with demanded tool calls, and for answers that are constrained after reasoning.

Here stands only how calls and reasoning are written around what a caller wants, whose own translation is in
`notation`. `<[7]>` stands for the token 7: a marker may be a token of its own, even a special one,
which no text spells, so a grammar names both.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.text.answers.answer_formats import AnswerFormat, ToolFormat
from albireo_jax.text.answers.reasoning import CLOSE, OPEN, Thinking
from albireo_jax.text.grammar.notation import part, quoted

TokenId = Callable[[str], int | None]
"""Id of a token by its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that may be called; `parameters` is the JSON schema of its arguments, as text.

    The arguments are an object whatever the schema says; an empty schema, as an empty text, allows none.
    """

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

    def opens(text: str) -> str:
        rules.append(f"opened[lazy]: {quoted(text)}")
        return _opening(text, token_id)

    rules: list[str] = []
    if format.tools is ToolFormat.HERMES:
        opening, closing = opens("<tool_call>"), marker("</tool_call>")
        calls = [
            f"{opening} {_object_call(i, function, 'arguments', before=_NEWLINE, after=_NEWLINE)} {closing}"
            for i, function in enumerate(functions)
        ]
        start = _separated("call", '"\\n"', parallel=parallel)
    elif format.tools is ToolFormat.LLAMA3_JSON:
        calls = [_object_call(i, function, "parameters") for i, function in enumerate(functions)]
        begin = opens("<|python_tag|>") if marked else ""
        start = f"{begin} {_separated('call', _SEMICOLON, parallel=parallel)}"
    elif format.tools is ToolFormat.MISTRAL and format.names_first:
        begin, middle = opens("[TOOL_CALLS]"), marker("[ARGS]")
        calls = [
            f"{begin} {quoted(function.name)} {middle} {part(i)}" for i, function in enumerate(functions)
        ]
        start = "call+" if parallel else "call"
    elif format.tools is ToolFormat.MISTRAL:
        calls = [_object_call(i, function, "arguments") for i, function in enumerate(functions)]
        start = f'{opens("[TOOL_CALLS]")} "[" {_separated("call", _COMMA, parallel=parallel)} "]"'
    else:
        raise ValueError("tools are not supported: how the model writes tool calls is not known")
    rules += [f"call_{i}: {call}" for i, call in enumerate(calls)]
    names = " | ".join(f"call_{i}" for i in range(len(calls)))
    arguments = [
        StructuredOutput(kind=StructureKind.ARGUMENTS, text=function.parameters) for function in functions
    ]
    return _composed(f"start: {start}", f"call: {names}", *rules, parts=arguments)


def either(first: StructuredOutput, second: StructuredOutput) -> StructuredOutput:
    """The constraint that allows an output of `first` or of `second`."""
    return _composed(f"start: {part(0)} | {part(1)}", parts=[first, second])


def after_reasoning(
    structured: StructuredOutput, thinking: Thinking, *, token_id: TokenId
) -> StructuredOutput:
    """The constraint on what follows the reasoning, which is free."""
    if thinking is Thinking.OVER:
        return structured
    opening, closing = _opening(OPEN, token_id), token_id(CLOSE)
    by_token = "" if closing is None else f" | /(.|\\n)*/ <[{closing}]>"
    reasoning = f"{opening}? thoughts" if thinking is Thinking.BEGUN else f"({opening} thoughts)?"
    return _composed(
        f"start: {reasoning} {part(0)}",
        f"thoughts: (spelled{by_token}) /[ \\t\\n\\r]{{0,64}}/",
        "spelled[lazy]: /(.|\\n)*<\\/think>/",
        f"opened[lazy]: {quoted(OPEN)}",
        parts=[structured],
    )


_NEWLINE, _COMMA, _SEMICOLON = "\n", '", "', '"; "'


def _composed(*rules: str, parts: Sequence[StructuredOutput]) -> StructuredOutput:
    text = "".join(f"{rule}\n" for rule in rules)
    return StructuredOutput(kind=StructureKind.COMPOSED, text=text, parts=tuple(parts))


def _separated(rule: str, separator: str, *, parallel: bool) -> str:
    return f"{rule} ({separator} {rule})*" if parallel else rule


def _object_call(index: int, function: Function, key: str, *, before: str = "", after: str = "") -> str:
    opening = f'{before}{{"name": {json.dumps(function.name)}, "{key}": '
    return f"{quoted(opening)} {part(index)} {quoted('}' + after)}"


def _opening(text: str, token_id: TokenId) -> str:
    """The marker at the very beginning: what begins with it is nothing else, whatever else may be written.

    The grammar has a rule `opened[lazy]` for its spelling.
    """
    token = token_id(text)
    return "opened" if token is None else f"(opened | <[{token}]>)"


def _marker(text: str, token_id: TokenId) -> str:
    token = token_id(text)
    return quoted(text) if token is None else f"({quoted(text)} | <[{token}]>)"
