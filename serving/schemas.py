"""OpenAI's wire types for what we serve, strict about types.

Unknown fields are ignored, as OpenAI-compatible servers do, and so are those without an effect on the
answer (`user`, `metadata`, `store`, …). Fields that would change the answer and are not implemented are
refused by name unless they hold a value that asks for nothing. null is as good as an absent field.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from albireo_jax.core.types import SamplingParams

MAX_STOP_STRINGS = 32
MAX_CHOICES = 1024
"""Prompts times n of one body."""

_Refused = Mapping[str, tuple[object, ...]]

_REFUSED: _Refused = {
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "response_format": ({"type": "text"},),
    "priority": (0,),
    "return_token_ids": (False,),
}
"""Field -> values that ask for nothing, besides null."""

_REFUSED_COMPLETION: _Refused = {**_REFUSED, "logprobs": (False,), "suffix": ("",), "prompt_embeds": ([],)}
_REFUSED_CHAT: _Refused = {
    **_REFUSED,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
_REFUSED_MESSAGE: _Refused = {"tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": ("",)}


def _one_message(message: str) -> WrapValidator:
    """Replace the errors of a union, one per member, by one that says what is wanted."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(message) from error

    return WrapValidator(check)


Prompts = Annotated[
    str | list[int] | list[str] | list[list[int]],
    _one_message("must be a string, token ids, a list of strings or a list of token id lists"),
]
StopStrings = Annotated[str | list[str], _one_message("must be a string or a list of strings")]


class Wire(BaseModel):
    """A JSON object from a client: no type is coerced, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    refused: ClassVar[_Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, value: Any) -> Any:
        """Refuse a field that would change the answer but is not implemented."""
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        for name, neutral in cls.refused.items():
            if name in value and not _asks_for_nothing(value[name], neutral):
                raise ValueError(f"{name} is not supported")
        return value

    @classmethod
    def field_in(cls, message: str) -> str | None:
        """The field that an error message begins with, if it does."""
        word = message.partition(" ")[0].rstrip(":")
        return word if word in cls.model_fields or word in cls.refused else None


class StreamOptions(Wire):
    """What a stream carries besides its text."""

    include_usage: bool | None = None


class SamplingBody(Wire):
    """What completions and chat completions have in common; null takes the default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="after")
    def check_stream_options(self) -> "SamplingBody":
        """Refuse options of a stream that was not asked for."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """How to choose tokens; raises ValueError for values out of range."""
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings, the limit is {MAX_STOP_STRINGS}")
        given: dict[str, Any] = {"max_tokens": default_max_tokens}
        given |= {name: value for name, value in self if name in _SAMPLING_FIELDS and value is not None}
        return SamplingParams(**given)


_SAMPLING_FIELDS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    refused = _REFUSED_COMPLETION

    prompt: Prompts
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def check_best_of(self) -> "CompletionBody":
        """Refuse to draw more samples than are returned."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not supported unless it equals n {self.n or 1}")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids; raises ValueError if there are none or too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ValueError("prompt is empty")
        if isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        if len(prompt) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(
                f"prompt: {len(prompt)} prompts with n {self.n or 1} exceed {MAX_CHOICES} choices"
            )
        return prompt  # type: ignore[return-value]


class TextPart(Wire):
    """A part of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


Content = Annotated[str | list[TextPart], _one_message("must be a string or a list of text parts")]


class MessageBody(Wire):
    """One message of a chat."""

    refused = _REFUSED_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def message(self) -> dict[str, Any]:
        """The message as chat templates read it; a developer message is a system message."""
        content = self.content
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content if isinstance(content, str) else [part.model_dump() for part in content],
        }


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    refused = _REFUSED_CHAT

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def rename_max_tokens(self) -> "ChatBody":
        """`max_tokens` is the old name of `max_completion_tokens`, which wins."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def chat(self) -> list[dict[str, Any]]:
        """The messages, as chat templates read them."""
        return [message.message() for message in self.messages]


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


class DetokenizeBody(Wire):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def _asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    if value is None:
        return True
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in neutral
    )
