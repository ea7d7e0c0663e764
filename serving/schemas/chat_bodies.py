"""OpenAI's wire types for chats: the bodies that hold a conversation."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field, model_validator

from albireo_jax.core.checks import integer
from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.types import ALL_LOGPROBS, SamplingParams
from albireo_jax.serving.schemas.completion_bodies import REFUSED, SamplingBody
from albireo_jax.serving.schemas.conversation_bodies import ConversationBody, MessageBody, NamedTool
from albireo_jax.serving.schemas.strict_model import Refused, Whole
from albireo_jax.text.grammar.tool_grammar import Function

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
}


class ChatBody(ConversationBody, SamplingBody):
    """Body of POST /v1/chat/completions."""

    refused = _REFUSED_CHAT

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def rename_max_tokens(self) -> "ChatBody":
        """`max_tokens` is the old name of `max_completion_tokens`, which wins."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @model_validator(mode="after")
    def check_top_logprobs(self) -> "ChatBody":
        """Refuse a number out of range, and to add to what was not asked for."""
        if self.top_logprobs is not None:
            integer("top_logprobs", self.top_logprobs, low=ALL_LOGPROBS, high=MAX_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    def sampling_params(self, default_max_tokens: int | None) -> SamplingParams:
        """As of any body."""
        params = super().sampling_params(default_max_tokens)
        return replace(params, logprobs=self.top_logprobs or 0) if self.logprobs else params

    def spoken(self) -> list[MessageBody]:
        """The messages as they came."""
        return self.messages

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


class TokenizeBody(ConversationBody):
    """Body of POST /tokenize: a prompt, or a conversation as the body of a chat has it."""

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

    def spoken(self) -> list[MessageBody]:
        """The messages as they came; none if there is a prompt."""
        return self.messages or []
