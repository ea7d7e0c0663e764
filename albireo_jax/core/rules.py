"""What a request wants done to its logits before a token is chosen: penalties, biases, refused tokens."""

from dataclasses import dataclass

MAX_BIASED_TOKENS = 1024
"""Tokens with a bias that a request can have."""

MAX_BAD_WORDS = 64
"""Token sequences that a request can refuse."""

MAX_BAD_WORD_TOKENS = 8
"""Tokens of the longest sequence that can be refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """Rules of one request, in terms of token ids; the defaults change nothing.

    In this order: only `allowed_token_ids` may be sampled (empty: all); the last token of a sequence in
    `bad_words` is refused when the others were just generated; `logit_bias` is added; the repetition
    penalty divides the positive logits, and multiplies the negative ones, of tokens in prompt or answer;
    the frequency penalty is taken off once for each time a token is in the answer, and the presence penalty
    once if it is.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

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

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids that the rules name."""
        biased = (token_id for token_id, _ in self.logit_bias)
        refused = (token_id for word in self.bad_words for token_id in word)
        return *biased, *self.allowed_token_ids, *refused


NO_RULES = TokenRules()
