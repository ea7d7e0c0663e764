"""The fewest tokens that a text can have, known without tokenizing it.

A token covers at most as many bytes as the longest entry of the vocabulary. This bounds the tokens of a text
from below only if no part of a text is dropped or shortened on its way to the vocabulary; where a tokenizer
might do that and it is not known by how much, there is no bound. So the bound never refuses a text that fits.
"""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from albireo_jax.text.token_bytes import BYTE_OF_CHAR

_MOST_COMPOSED = 4
"""Bytes that NFC can make one byte; three, the Kelvin sign's, are the most in Unicode 16."""

_Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBound:
    """A token covers at most `bytes_per_token` bytes of a text.

    Bytes in `dropped` are in no token. If `drops_spaces`, white space beside special tokens is in none.
    """

    bytes_per_token: int
    dropped: bytes = b""
    drops_spaces: bool = False

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least. Raises UnicodeEncodeError for half surrogate pairs."""
        if self.drops_spaces:
            text = "".join(text.split())
        data = text.encode()
        if self.dropped:
            data = data.translate(None, self.dropped)
        return -(-len(data) // self.bytes_per_token)


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """The bound that holds for a tokenizer, None if none is known."""
    model, added = backend.model, backend.get_added_tokens_decoder().values()
    shrinks = _most_shrunk(_state(backend.normalizer))
    stages = _stages(_state(backend.pre_tokenizer), "pretokenizers")
    if (
        not isinstance(model, tokenizers.models.BPE)
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or shrinks is None
        or any(_may_drop(stage) for stage in stages)
    ):
        return None
    vocab = backend.get_vocab(with_added_tokens=False)
    longest_added = max((len(token.content.encode()) for token in added), default=1)
    if any(stage["type"] == "ByteLevel" for stage in stages):
        longest = max(map(len, vocab), default=1)
        dropped = bytes(sorted(byte for char, byte in BYTE_OF_CHAR.items() if char not in vocab))
        if dropped and model.unk_token is not None:
            return None
    elif model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        longest, dropped = max((len(piece.encode()) for piece in vocab), default=1), b""
    else:
        return None
    return TextBound(
        bytes_per_token=max(longest, longest_added) * shrinks,
        dropped=dropped,
        drops_spaces=any(token.lstrip or token.rstrip for token in added),
    )


def _most_shrunk(state: _Json | None) -> int | None:
    """The most bytes that a normalizer turns into one; None if that is not known."""
    if state is None:
        return 1
    shrinks = 1
    for stage in _stages(state, "normalizers"):
        match stage:
            case {"type": "Prepend"}:
                pass
            case {"type": "NFC"}:
                shrinks *= _MOST_COMPOSED
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(
                new.encode()
            ) >= len(old.encode()):
                pass
            case _:
                return None
    return shrinks


def _may_drop(stage: _Json) -> bool:
    """Whether a pre-tokenizer might leave out part of a text."""
    match stage:
        case {"type": "ByteLevel" | "Digits" | "Metaspace"}:
            return False
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return behavior == "Removed"
        case _:
            return True


def _stages(state: _Json | None, key: str) -> list[_Json]:
    if state is None:
        return []
    return state[key] if state["type"] == "Sequence" else [state]


def _state(part: Any) -> _Json | None:
    return None if part is None else json.loads(part.__getstate__())
