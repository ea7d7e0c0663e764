"""The logit rules of a request, applied before a token is sampled: penalties, biases, refused tokens."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.token_ids import token_array

MAX_BIASED_TOKENS = 1024
"""Tokens with a bias that a request can have."""

MAX_BAD_WORDS = 64
"""Token sequences that a request can refuse."""

MAX_WORDS = MAX_BAD_WORDS // 2
"""Words that a request can refuse: each is spelled in two ways, with a space before it and without."""

MAX_BAD_WORD_TOKENS = 8
"""Tokens of the longest sequence that can be refused."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitRules:
    """Rules of one request, in terms of token ids; the defaults change nothing. Equal by content.

    In this order: only `allowed_token_ids` may be sampled (empty: all); the last token of a sequence in
    `bad_words` is refused when the others were just generated; `logit_bias` is added; the repetition
    penalty divides the positive logits, and multiplies the negative ones, of tokens in prompt or answer;
    the frequency penalty is taken off once for each time a token is in the answer, and the presence penalty
    once if it is.

    `allowed_token_ids` may be given as any sequence of ints, and becomes a read-only array, which the samples
    of one prompt share. `token_ids` are all ids that the rules name: biased, allowed, refused. None of them
    is below `lowest_id` or above `highest_id`.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    bad_words: tuple[tuple[int, ...], ...] = ()
    token_ids: NDArray[np.int32] = field(init=False, repr=False)
    lowest_id: int = field(init=False, repr=False)
    highest_id: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse more than a slot can hold; raises ValueError naming the value and the limit."""
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} tokens, the limit is {MAX_BIASED_TOKENS}"
            )
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValueError(
                f"bad_words has {len(self.bad_words)} token sequences, the limit is {MAX_BAD_WORDS}"
            )
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise ValueError(
                    f"bad_words has a sequence of {len(word)} tokens, the limit is {MAX_BAD_WORD_TOKENS}"
                )
        allowed = token_array("allowed_token_ids", self.allowed_token_ids)
        biased = token_array("logit_bias", [token_id for token_id, _ in self.logit_bias])
        refused = token_array("bad_words", [token_id for word in self.bad_words for token_id in word])
        object.__setattr__(self, "allowed_token_ids", allowed)
        named = token_array("token ids", np.concatenate((biased, allowed, refused)))
        object.__setattr__(self, "token_ids", named)
        object.__setattr__(self, "lowest_id", int(named.min(initial=0)))
        object.__setattr__(self, "highest_id", int(named.max(initial=0)))

    def __eq__(self, other: object) -> bool:
        """Whether `other` are the same rules."""
        return isinstance(other, LogitRules) and self._content() == other._content()

    def __hash__(self) -> int:
        """Hash of the content."""
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return *penalties, self.logit_bias, self.allowed_token_ids.tobytes(), self.bad_words


NO_RULES = LogitRules()
