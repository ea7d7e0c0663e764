"""The limits of a running engine, checked when a request is added, before it is queued."""

from dataclasses import dataclass

import numpy as np

from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import ALL_LOGPROBS, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The longest sequence, the vocabulary, and the KV pages of an engine, on the device and in the host.

    `max_logprobs` likeliest tokens can be asked for; 0 means that the engine gives no log probabilities.
    Without `takes_priority` every request has priority 0.
    """

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_logprobs: int = MAX_LOGPROBS
    num_host_pages: int = 0
    takes_priority: bool = False

    @property
    def max_sequence_len(self) -> int:
        """Tokens of prompt and answer together that one request can ever hold."""
        return min(self.max_model_len, self.num_pages * self.page_size)

    def resolve_max_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Tokens that a request may generate: what it asks for, or all that fits if it asks for None.

        Raises ContextLengthError if the prompt leaves no room for one token; `check` refuses more than fits.
        """
        self.check_prompt_len(num_prompt_tokens)
        return self.max_sequence_len - num_prompt_tokens if max_tokens is None else max_tokens

    def resolve_logprobs(self, name: str, wanted: int | None) -> int | None:
        """Likeliest tokens to give in each place: what is asked for, or the vocabulary for ALL_LOGPROBS.

        Raises ValueError, with the vocabulary and the limit, if that is more than this engine gives.
        """
        if wanted != ALL_LOGPROBS:
            return wanted
        if self.vocab_size > self.max_logprobs:
            raise ValueError(
                f"{name} {ALL_LOGPROBS} asks for all {self.vocab_size} tokens of the vocabulary, "
                f"the limit is {self.max_logprobs}"
            )
        return self.vocab_size

    def check(self, request: Request) -> None:
        """Raise ValueError, with the value and the limit, if the engine could never finish `request`.

        A sequence that would be too long is a ContextLengthError.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        self.check_prompt_len(num_prompt_tokens)
        length = num_prompt_tokens + request.max_tokens
        if length > self.max_model_len:
            raise ContextLengthError(
                self.max_sequence_len,
                f"{num_prompt_tokens} prompt tokens and max_tokens {request.max_tokens} exceed the model's "
                f"limit of {self.max_model_len} tokens",
            )
        if length > self.max_sequence_len:
            raise ContextLengthError(
                self.max_sequence_len,
                f"{num_prompt_tokens} prompt tokens and max_tokens {request.max_tokens} need {length} tokens "
                f"of KV cache, it holds {self.num_pages * self.page_size}",
            )
        self.check_priority(request.priority)
        self._check_logprobs("logprobs", request.logprobs)
        self._check_logprobs("prompt_logprobs", request.prompt_logprobs)
        self._check_ids(request.prompt_token_ids)
        for token in request.stop_ids:
            if not 0 <= token < self.vocab_size:
                raise self._outside(token)
        rules = request.rules  # of many requests, perhaps with all ids: only their range is looked at
        if rules is not None and (rules.lowest_id < 0 or rules.highest_id >= self.vocab_size):
            self._check_ids(rules.token_ids)

    def _check_ids(self, token_ids: Int32s) -> None:
        if token_ids.min() < 0 or token_ids.max() >= self.vocab_size:
            outside = (token_ids < 0) | (token_ids >= self.vocab_size)
            raise self._outside(int(token_ids[np.argmax(outside)]))

    def _outside(self, token_id: int) -> ValueError:
        return ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")

    def _check_logprobs(self, name: str, wanted: int | None) -> None:
        if wanted is None:
            return
        if not self.max_logprobs:
            raise ValueError(f"{name} {wanted}: log probabilities are turned off in this engine")
        if wanted > self.max_logprobs:
            raise ValueError(f"{name} {wanted} exceeds the limit of {self.max_logprobs}")

    def check_priority(self, priority: int) -> None:
        """Raise ValueError for a priority that the engine's scheduling policy does not look at."""
        if priority and not self.takes_priority:
            raise ValueError(
                f"priority {priority} needs an engine whose scheduling policy is priority "
                f"(--scheduling-policy priority); without it every request has priority 0"
            )

    def check_prompt_len(self, num_prompt_tokens: int) -> None:
        """Raise ValueError for an empty prompt, ContextLengthError for one that leaves no room."""
        if num_prompt_tokens < 1:
            raise ValueError("the prompt is empty, at least 1 token is needed")
        if num_prompt_tokens >= self.max_sequence_len:
            raise ContextLengthError(
                self.max_sequence_len,
                f"the prompt has {num_prompt_tokens} tokens, the limit is {self.max_sequence_len - 1} "
                f"so that one more can be generated",
            )
