"""Formats of tool calls and reasoning, and the choice of a model's own by its chat template.

A chat template says it: it shows the model calls from earlier turns, or describes how to write one.
"""

from dataclasses import dataclass
from enum import StrEnum


class ToolFormat(StrEnum):
    """Formats in which models write tool calls."""

    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"
    NONE = "none"


class ReasoningFormat(StrEnum):
    """Formats in which models set off their reasoning: between `<think>` and `</think>`.

    DEEPSEEK_R1 may leave the first tag out; QWEN3 does only where the prompt ends with it.
    """

    QWEN3 = "qwen3"
    DEEPSEEK_R1 = "deepseek_r1"
    NONE = "none"


_MARKERS = {
    ToolFormat.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFormat.LLAMA3_JSON: ("<|python_tag|>",),
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ToolFormat.NONE: (),
}
_DEEPSEEK = "<\N{FULLWIDTH VERTICAL LINE}Assistant\N{FULLWIDTH VERTICAL LINE}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The formats of a model's answers.

    `names_first` tells the newer of Mistral's two ways: `name[ARGS]{…}` instead of a list of objects.
    """

    tools: ToolFormat = ToolFormat.NONE
    reasoning: ReasoningFormat = ReasoningFormat.NONE
    names_first: bool = False

    def shown_tokens(self, *, tools: bool) -> tuple[str, ...]:
        """Tokens whose text a parser needs, even where they are special ones; of calls only with `tools`."""
        thinks = ("<think>", "</think>") if self.reasoning is not ReasoningFormat.NONE else ()
        return (*thinks, *(_MARKERS[self.tools] if tools else ()))


def answer_format(
    template: str, *, tools: ToolFormat | None = None, reasoning: ReasoningFormat | None = None
) -> AnswerFormat:
    """Formats of a model with this chat template; a format that is given is not guessed."""
    return AnswerFormat(
        tools=_tool_format(template) if tools is None else tools,
        reasoning=_reasoning_format(template) if reasoning is None else reasoning,
        names_first="[ARGS]" in template,
    )


def _tool_format(template: str) -> ToolFormat:
    if "<tool_call>" in template and "<function=" not in template:  # which has XML inside
        return ToolFormat.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolFormat.MISTRAL
    if "<|python_tag|>" in template or '{"name": function name, "parameters": ' in template:
        return ToolFormat.LLAMA3_JSON
    return ToolFormat.NONE


def _reasoning_format(template: str) -> ReasoningFormat:
    if "<think>" not in template and "</think>" not in template:
        return ReasoningFormat.NONE
    return ReasoningFormat.DEEPSEEK_R1 if _DEEPSEEK in template else ReasoningFormat.QWEN3
