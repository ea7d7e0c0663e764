"""OpenAI's wire types for completions, and what they share with chats."""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from albireo_jax.core.checks import MAX_INT
from albireo_jax.core.sampling_defaults import SamplingDefaults
from albireo_jax.core.token_sampling import PARAMETERS, WordKind
from albireo_jax.core.types import ALL_LOGPROBS, SamplingParams
from albireo_jax.serving.request_id import MAX_REQUEST_ID
from albireo_jax.serving.schemas.foreign_fields import FOREIGN, INSTEAD
from albireo_jax.serving.schemas.strict_model import Refused, StrictModel, Whole, WholeNumbers, one_message
from albireo_jax.serving.schemas.structured_output import StructuredBody

MAX_BODY_SALT = 256
"""Characters of the `cache_salt` of a body; a request's has the hash of its API key as well."""

MAX_CHOICES = 1024
"""Prompts times n of one body."""

REFUSED: Refused = {**FOREIGN, "chat_template": ("",), "documents": ([],)}
"""Of completions and chats alike."""

_REFUSED_COMPLETION: Refused = {
    **REFUSED,
    "suffix": ("",),
    "prompt_embeds": ([],),
    "messages": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}

Prompts = Annotated[
    str | list[int] | list[str] | list[list[int]],
    one_message("must be a string, token ids, a list of strings or a list of token id lists"),
]
StopStrings = Annotated[str | list[str], one_message("must be a string or a list of strings")]


class StreamOptions(StrictModel):
    """The parts of a stream besides its text."""

    closed = True
    harmless = frozenset(("include_obfuscation",))

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


_WIRE_KINDS: dict[WordKind, Any] = {WordKind.FLOAT: float, WordKind.INT: Whole, WordKind.INT64: Whole}
_SAMPLING_FIELD_OF: dict[str, Any] = {
    name: (_WIRE_KINDS[parameter.kind] | None, None) for name, parameter in PARAMETERS.items()
}

TokenSamplingBody = create_model("TokenSamplingBody", __base__=StructuredBody, **_SAMPLING_FIELD_OF)
"""A body with a field for each parameter by which a token is chosen."""


class SamplingBody(TokenSamplingBody):
    """The fields that completions and chat completions have in common; null takes the default.

    A prompt is read from the cache as far as one of the same API key and the same `cache_salt` began like it:
    who serves several people by one key gives each another. The scheduling policy `priority` serves the
    lowest `priority` first, 0 if there is none; with another policy only 0 is accepted.
    """

    instead = INSTEAD

    model: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: WholeNumbers | None = None
    bad_words: list[str] | None = None
    stop: StopStrings | None = None
    stop_token_ids: WholeNumbers | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Whole | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_BODY_SALT)] | None = None
    priority: Annotated[Whole, Field(ge=-MAX_INT, le=MAX_INT)] | None = None

    @model_validator(mode="after")
    def check_prompt_logprobs(self) -> "SamplingBody":
        """Refuse what a stream has no place for."""
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not available when stream is true")
        return self

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

    def truncated(self, token_ids: tuple[int, ...], *, room: int) -> tuple[int, ...]:
        """The last tokens of a prompt: as many as `truncate_prompt_tokens` says, -1 for what has `room`.

        `truncation_side` right keeps the first ones. Raises ValueError for a number that keeps none.
        """
        keep = self.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep < -1 or keep == 0:
            raise ValueError(f"truncate_prompt_tokens must be -1 or at least 1, got {keep}")
        keep = max(room, 1) if keep == -1 else keep
        return token_ids[:keep] if self.truncation_side == "right" else token_ids[-keep:]

    def filled(self, defaults: SamplingDefaults) -> Self:
        """The same body with the model's sampling parameters in the place of those that are not given."""
        own = dict(self)
        values = {name: value for name, value in defaults.given().items() if own[name] is None}
        values.pop("max_tokens", None)  # depends on the prompt, and completions have a default of their own
        return self.model_copy(update=values) if values else self

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """The body's sampling parameters; raises ValueError for values out of range."""
        given: dict[str, Any] = {"max_tokens": default_max_tokens}
        given |= {name: value for name, value in self if name in _SAMPLING_FIELDS and value is not None}
        if not self.stop:
            given.pop("stop", None)
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return SamplingParams(**given, structured=self.structured())


_SAMPLING_FIELDS = (
    *PARAMETERS,
    "n",
    "max_tokens",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "allowed_token_ids",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
)


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    refused = _REFUSED_COMPLETION

    prompt: Prompts
    echo: bool | None = None
    logprobs: Whole | None = None
    best_of: Whole | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def check_best_of(self) -> "CompletionBody":
        """Refuse to draw more samples than are returned."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of {self.best_of} is not supported unless it equals n {self.n or 1}")
        return self

    @property
    def generates(self) -> bool:
        """Whether anything is to follow the prompt: to have a prompt scored, one asks for it alone."""
        return self.max_tokens != 0 or not self.echo

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """As of any body; what is echoed and not to be continued is continued by a token that nobody sees."""
        body = self if self.generates else self.model_copy(update={"max_tokens": 1})
        params = super(CompletionBody, body).sampling_params(default_max_tokens)
        of_prompt = [self.prompt_logprobs, self.logprobs if self.echo else None]
        counts = [count for count in of_prompt if count is not None]
        wanted = ALL_LOGPROBS if ALL_LOGPROBS in counts else max(counts, default=None)
        return replace(params, logprobs=self.logprobs, prompt_logprobs=wanted)

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


class DetokenizeBody(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def num_top(asked: int | None) -> int | None:
    """Likeliest tokens to show in each place; None for all that come."""
    return None if asked == ALL_LOGPROBS else asked or 0


def _token_id(key: str) -> int:
    """A token id written as a key of a JSON object."""
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"logit_bias must map token ids to numbers, got the key {key!r:.50}")
    return int(key)
