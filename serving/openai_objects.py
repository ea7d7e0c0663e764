"""From a body to an open stream: the model's name, the caller's faults, the prompts' token ids; its usage."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from albireo_jax.engine.choices import ChoiceDelta, Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """The fields that every object of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str, *, request_id: str | None = None) -> "Heading":
        """The heading of an answer made now, under the id of its request, or else one of its own."""
        return cls(id=f"{prefix}-{request_id or uuid.uuid4().hex}", created=int(time.time()), model=model)

    def object(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An OpenAI object of `kind`."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


class UsageCounter:
    """Counts the tokens of a stream with `n` samples of each prompt, to be told as OpenAI's usage object.

    A prompt counts once, and as cached what its first sample found. Answers do not count unless they are
    `shown`.
    """

    def __init__(self, num_prompt_tokens: int, *, n: int, shown: bool = True) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._n = n
        self._shown = shown
        self._num_generated = self._num_cached = 0

    def count(self, outcomes: Iterable[ChoiceDelta | Completion]) -> None:
        """Add what choices brought."""
        for outcome in outcomes:
            if self._shown:
                self._num_generated += len(outcome.token_ids)
            if outcome.cached_tokens and outcome.choice % self._n == 0:
                self._num_cached += outcome.cached_tokens

    def object(self) -> dict[str, Any]:
        """OpenAI's object of what was counted so far."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": self._num_prompt_tokens + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }
