"""OpenAI's wire types for chats: messages, tools, and bodies that hold them."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.types import ALL_LOGPROBS, SamplingParams
from albireo_jax.engine.tool_calls import is_function_name
from albireo_jax.engine.tool_grammar import Function
from albireo_jax.serving.schemas import REFUSED, SamplingBody
from albireo_jax.serving.schemas_structured import json_schema
from albireo_jax.serving.wire import Refused, Whole, Wire, one_message

_REFUSED_CHAT: Refused = {
    **REFUSED,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "add_special_tokens": (False,),
    "prompt": ("", []),
    "suffix": ("",),
    "prompt_embeds": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
_REFUSED_MESSAGE: Refused = {"function_call": (), "audio": ()}
_TEMPLATE_ARGUMENTS = frozenset(("self", "messages", "tools", "add_generation_prompt"))


class TextPart(Wire):
    """A part of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


Content = Annotated[str | list[TextPart], one_message("must be a string or a list of text parts")]


class CalledFunction(Wire):
    """What an earlier answer called; `arguments` is JSON text, or whatever the model wrote instead."""

    name: str
    arguments: str


class ToolCallBody(Wire):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageBody(Wire):
    """One message of a chat."""

    refused = _REFUSED_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def check_role(self) -> "MessageBody":
        """Refuse what does not belong to the role, and a message that says nothing."""
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are for the role assistant, not {self.role}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id is required for the role tool")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required unless there are tool_calls")
        return self

    def message(self) -> dict[str, Any]:
        """The message as chat templates read it; a developer message is a system message."""
        content = self.content
        optional = {
            "name": self.name,
            "tool_calls": [call.model_dump() for call in self.tool_calls or []] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": [part.model_dump() for part in content] if isinstance(content, list) else content,
            **{name: value for name, value in optional.items() if value is not None},
        }


class FunctionBody(Wire):
    """A function that the model may call; without `parameters` it takes none."""

    refused = {"input_schema": (), "schema": (), "defer_loading": (False,)}  # noqa: RUF012
    instead = {"input_schema": "parameters", "schema": "parameters"}  # noqa: RUF012

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Wire):
    """A tool; only functions are known."""

    refused = {"defer_loading": (False,)}  # noqa: RUF012

    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict", "parameters"})
        parameters = {"type": "object", "properties": {}}
        if self.function.parameters is not None:
            parameters = self.function.parameters
        return {"type": "function", "function": {**function, "parameters": parameters}}

    def callable_function(self, where: str) -> Function:
        """The function as grammars need it; raises ValueError for a name or a schema that cannot be."""
        name, parameters = self.function.name, self.function.parameters
        if not is_function_name(name):
            raise ValueError(f"{where}.name must be letters, digits and any of _-.:/, got {name!r:.80}")
        if parameters is None:
            parameters = {"type": "object", "additionalProperties": False}
        return Function(name=name, parameters=json_schema(f"{where}.parameters", parameters).text)


class NamedFunction(Wire):
    """The name of a function."""

    closed = True

    name: str


class NamedTool(Wire):
    """The choice of one tool."""

    closed = True

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    one_message('must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}'),
]


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    refused = _REFUSED_CHAT

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=ALL_LOGPROBS, le=MAX_LOGPROBS)] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None

    @model_validator(mode="after")
    def rename_max_tokens(self) -> "ChatBody":
        """`max_tokens` is the old name of `max_completion_tokens`, which wins."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @model_validator(mode="after")
    def check_top_logprobs(self) -> "ChatBody":
        """Refuse to add to what was not asked for."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """As of any body."""
        params = super().sampling_params(default_max_tokens)
        return replace(params, logprobs=self.top_logprobs or 0) if self.logprobs else params

    @model_validator(mode="after")
    def check_template_arguments(self) -> "ChatBody":
        """Refuse to give a template another conversation than that of the body."""
        for name in self.chat_template_kwargs or {}:
            if name in _TEMPLATE_ARGUMENTS:
                raise ValueError(f"chat_template_kwargs cannot set {name}")
        return self

    @property
    def uses_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def template_variables(self, template: str) -> dict[str, Any]:
        """Variables of the chat template whose source is given.

        `reasoning_effort` goes to the variable of this name and, as a yes or no, to `enable_thinking`. Raises
        ValueError for an effort that the template does not read.
        """
        given = self.chat_template_kwargs or {}
        effort = self.reasoning_effort
        if effort is None:
            return given
        variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        read = {name: value for name, value in variables.items() if name in template}
        if not read:
            raise ValueError("reasoning_effort is not supported: this model's chat template does not read it")
        return read | given

    def chat(self) -> list[dict[str, Any]]:
        """The messages, as chat templates read them."""
        return [message.message() for message in self.messages]

    @property
    def may_call_several(self) -> bool:
        """Whether an answer may hold more than one call."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    def offered_functions(self) -> list[Function]:
        """The functions that the answer may call; raises ValueError for names or schemas that cannot be."""
        if not self.uses_tools:
            return []
        return [tool.callable_function(f"tools.{i}.function") for i, tool in enumerate(self.tools or [])]

    def demanded_functions(self) -> list[Function]:
        """The functions of which the answer must call one; none where it need not.

        Raises ValueError for the choice of a tool that is not there, and as `offered_functions`.
        """
        if self.tool_choice is None or self.tool_choice in ("none", "auto"):
            return []
        offered = self.offered_functions()
        if not offered:
            raise ValueError("tool_choice needs tools to choose from")
        if not isinstance(self.tool_choice, NamedTool):
            return offered
        name = self.tool_choice.function.name
        named = [function for function in offered if function.name == name]
        if not named:
            raise ValueError(f"tool_choice is {name!r:.80}, which is not the name of a tool")
        return named[:1]


class TokenizeBody(Wire):
    """Body of POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def check_one(self) -> "TokenizeBody":
        """Refuse both, and neither."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is needed")
        return self

    def asked(self) -> str | list[dict[str, Any]]:
        """What to encode: a text or messages."""
        return (
            self.prompt if self.prompt is not None else [message.message() for message in self.messages or []]
        )
