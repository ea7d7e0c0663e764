"""OpenAI's wire types for a conversation: messages, tools, and how a chat template is to render them."""

from typing import Annotated, Any, Literal, Required

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from typing_extensions import TypedDict

from albireo_jax.serving.schemas.strict_model import Refused, StrictModel, one_message
from albireo_jax.serving.schemas.structured_output import json_schema
from albireo_jax.text.answers.call_reader import is_function_name
from albireo_jax.text.grammar.tool_grammar import Function
from albireo_jax.text.messages import check_message, check_part

_REFUSED_MESSAGE: Refused = {"function_call": (), "audio": ()}
_TEMPLATE_ARGUMENTS = frozenset(
    ("self", "messages", "tools", "add_generation_prompt", "continue_final_message")
)
_OPEN = ConfigDict(extra="allow")
"""Of objects whose further fields go to the chat template."""


_MESSAGE_SIZE, _CALL_SIZE, _PARTS_SIZE = 64, 1024, 4096
"""Characters that a message, a call or a tool, and a content in parts count for."""


class ContentPart(TypedDict, total=False):
    """A part of a message's content; only text can be read."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]  # pydantic reads it

    type: Required[str]
    text: str | None
    refusal: str | None


def _check_content(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    wanted = "must be a string or a list of text parts"
    try:
        content = handler(value)
    except ValidationError as error:
        raise ValueError(wanted) from error
    for i, part in enumerate(content if isinstance(content, list) else ()):
        try:
            check_part(part)
        except ValueError as error:
            raise ValueError(f"{wanted}; part {i}: {error}") from error
    return content


Content = Annotated[str | list[str | ContentPart], WrapValidator(_check_content)]


class CalledFunction(StrictModel):
    """The function of an earlier call; `arguments` is an object, or JSON text, perhaps broken off."""

    model_config = _OPEN

    name: Annotated[str, Field(min_length=1)]
    arguments: str | dict[str, Any] | None = None


class ToolCallBody(StrictModel):
    """A call in an earlier answer; one without an id is named by its place."""

    model_config = _OPEN

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class MessageBody(StrictModel):
    """One message of a chat; further fields, and roles of its own, go to the chat template."""

    model_config = _OPEN
    refused = _REFUSED_MESSAGE

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def check_role(self) -> "MessageBody":
        """Refuse what does not belong to the role."""
        check_message(self.role, self.content, calls=bool(self.tool_calls))
        return self

    def message(self) -> dict[str, Any]:
        """The message as `engine.messages` reads it."""
        return self.model_dump(exclude_none=True)


class FunctionBody(StrictModel):
    """A function that the model may call; without `parameters` it takes none."""

    refused = {"input_schema": (), "schema": (), "defer_loading": (False,)}  # noqa: RUF012
    instead = {"input_schema": "parameters", "schema": "parameters"}  # noqa: RUF012

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(StrictModel):
    """A tool; only functions are known."""

    refused = {"defer_loading": (False,)}  # noqa: RUF012

    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> dict[str, Any]:
        """The tool as `engine.messages` reads it."""
        return self.model_dump(exclude_none=True)

    def callable_function(self, where: str) -> Function:
        """The function as grammars need it; raises ValueError for a name or a schema that cannot be."""
        name, parameters = self.function.name, self.function.parameters
        if not is_function_name(name):
            raise ValueError(f"{where}.name must be letters, digits and any of _-.:/, got {name!r:.80}")
        if parameters is None:
            parameters = {"type": "object", "additionalProperties": False}
        return Function(name=name, parameters=json_schema(f"{where}.parameters", parameters).text)


class NamedFunction(StrictModel):
    """The name of a function."""

    closed = True

    name: str


class NamedTool(StrictModel):
    """The choice of one tool."""

    closed = True

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    one_message('must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}'),
]


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ConversationBody(StrictModel):
    """The fields that say how a chat template renders a conversation.

    `add_generation_prompt` is true unless `continue_final_message` is, which has the model continue the last
    message.
    """

    tools: list[ToolBody] | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def check_template_arguments(self) -> "ConversationBody":
        """Refuse to give a template another conversation than that of the body."""
        for name in self.chat_template_kwargs or {}:
            if name in _TEMPLATE_ARGUMENTS:
                raise ValueError(f"chat_template_kwargs cannot set {name}")
        return self

    @property
    def uses_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def spoken(self) -> list[MessageBody]:
        """The messages as they came."""
        raise NotImplementedError

    def chat(self) -> list[dict[str, Any]]:
        """The messages."""
        return [message.message() for message in self.spoken()]

    def size(self) -> int:
        """About how many characters a template has to write, without looking into parts and schemas."""
        texts = sum(
            _MESSAGE_SIZE
            + (len(message.content or "") if not isinstance(message.content, list) else _PARTS_SIZE)
            + _CALL_SIZE * len(message.tool_calls or ())
            for message in self.spoken()
        )
        return texts + _CALL_SIZE * len(self.tools or ())

    def template_arguments(self, template: str) -> dict[str, Any]:
        """Arguments of `apply_chat_template` beside the messages, for the template whose source is given."""
        return {
            "tools": [tool.tool() for tool in self.tools or []] if self.uses_tools else None,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": bool(self.continue_final_message),
            **self.template_variables(template),
        }

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
