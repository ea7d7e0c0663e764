"""Log probabilities as OpenAI's objects have them: of completions, of chats, and vLLM's of prompts."""

from collections.abc import Sequence
from typing import Any

from albireo_jax.core.types import SamplingParams
from albireo_jax.text.detokenizer import TextOffsets
from albireo_jax.text.token_logprobs import TokenLogprob
from albireo_jax.text.tokenizer import Tokenizer

_LEAST = -9999.0
"""What minus infinity becomes, which JSON has not."""


class CompletionLogprobsWriter:
    """The `logprobs` objects of one choice of a completion, piece by piece; offsets run on.

    `offsets` tell where each token's text begins in the choice's. With `as_ids` a token is written
    `token_id:N`, which tells tokens of the same text apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        num_top: int | None,
        as_ids: bool = False,
        offsets: TextOffsets | None = None,
    ) -> None:
        self._spelling = _Spelling(tokenizer, as_ids=as_ids)
        self._num_top = num_top
        self._offsets = offsets or TextOffsets(tokenizer, SamplingParams(skip_special_tokens=False))

    def write(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """The object of the next tokens; None stands for a token that has nothing before it."""
        written: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            text = self._spelling.text(token_id)
            written["tokens"].append(text)
            written["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            written["top_logprobs"].append(None if entry is None else self._top(text, entry))
            written["text_offset"].append(self._offsets.next(token_id))
        return written

    def _top(self, text: str, entry: TokenLogprob) -> dict[str, float]:
        """Log probabilities by text: the token's, then the likeliest; the first of equal texts counts."""
        top = {text: _finite(entry.logprob)}
        for token_id, logprob in entry.top[: self._num_top]:
            top.setdefault(self._spelling.text(token_id), _finite(logprob))
        return top


class ChatLogprobsWriter:
    """The `logprobs` objects of a chat's choices, whole or of a chunk; None where they are not `wanted`."""

    def __init__(self, tokenizer: Tokenizer, *, wanted: bool, as_ids: bool = False) -> None:
        self._spelling = _Spelling(tokenizer, as_ids=as_ids)
        self._wanted = wanted

    def write(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The object of some tokens."""
        if not self._wanted:
            return None
        entry = self._spelling.entry
        content = [
            entry(of.token_id, of.logprob) | {"top_logprobs": [entry(*likely) for likely in of.top]}
            for of in logprobs
        ]
        return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], *, num_top: int | None
) -> list[dict[str, dict[str, Any]] | None]:
    """Of each token of a prompt but the first, by id: its own and the likeliest ones', as vLLM gives them."""
    spelling = _Spelling(tokenizer, as_ids=False)

    def ranked(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": spelling.text(token_id)}

    def of_token(entry: TokenLogprob) -> dict[str, dict[str, Any]]:
        top = {
            str(token_id): ranked(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1)
        }
        return {str(entry.token_id): ranked(entry.token_id, entry.logprob, entry.rank)} | top

    return [None if entry is None else of_token(entry) for entry in logprobs]


class _Spelling:
    """The text and bytes of a token by itself."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._bytes = tokenizer.token_bytes(skip_special_tokens=False)
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._bytes[token_id].decode("utf-8", "replace")

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._bytes[token_id]
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
