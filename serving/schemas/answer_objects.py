"""The objects that the server answers with, as its OpenAPI document describes them.

The routes write dictionaries; tests hold every answer against these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Object(BaseModel):
    """A JSON object in an answer; clients must expect further fields."""

    model_config = ConfigDict(extra="allow")


class ErrorDetail(Object):
    """An error, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Object):
    """The body of every answer that is no success."""

    error: ErrorDetail


class CachedTokens(Object):
    """Tokens of the prompts that were in the prefix cache."""

    cached_tokens: int


class Usage(Object):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(Object):
    """Log probabilities of a completion's tokens, a list entry each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Object):
    """A continuation of a prompt, or of a stream its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionAnswer(Object):
    """Continuations of the prompts; also the form of a stream's events."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(Object):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Object):
    """Log probabilities of an answer's tokens."""

    content: list[ChosenLogprob] | None
    refusal: None = None


class FunctionCall(Object):
    """A function and its arguments, which are JSON text; of a stream its next piece."""

    name: str | None = None
    arguments: str


class ToolCall(Object):
    """A call of a tool; in a stream the first piece alone has an id."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class ChatMessage(Object):
    """The assistant's message, or its next piece in a stream."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Object):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None


class ChatChunkChoice(Object):
    """The next piece of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None


class ChatAnswer(Object):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class ChatChunk(Object):
    """An event of a stream of answers."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Object):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    parent: str | None
    max_model_len: int


class ModelList(Object):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(Object):
    """Token ids of a prompt, and their texts if they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Object):
    """The text of token ids."""

    prompt: str


class Health(Object):
    """A sign of life."""

    status: Literal["ok"]


class Version(Object):
    """The version of the server."""

    version: str


class Load(Object):
    """Requests that are open, running or waiting."""

    server_load: int = Field(ge=0)
