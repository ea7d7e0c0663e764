"""The bytes that each token id stands for: what decoding joins, and streaming text is cut from.

Both families of decoder that language models use are a concatenation of bytes per token, read as UTF-8:

- byte level (GPT-2, Llama 3, Qwen): each character of a token spells one byte;
- SentencePiece (Llama 2, Mistral): `▁` is a space, `<0x0A>` is a byte, one leading space is dropped.

A table of bytes per id therefore decodes, whole or token by token, what the `tokenizers` package decodes
in one go. Unlike that package's `DecodeStream`, about as fast, it also gives out what is unfinished at the
end. One difference, in text that is no UTF-8: byte tokens in a row that spell no text give one U+FFFD
per ill-formed part, as Unicode recommends, where `tokenizers` also undoes the good characters of that row,
which no stream could do.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers

from albireo_jax.core.errors import ModelError

MAX_TOKEN_ID = 2**32 - 1
"""Ids of `tokenizers` are 32 bits wide."""


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, worked out when first asked for; no bytes for ids in `hidden` or unknown.

    `spelling` gives the vocabulary's spelling of an id, which `piece` turns into bytes.

    Filled on demand it costs no start-up time and holds only the tokens in use.
    """

    def __init__(
        self, spelling: Callable[[int], str | None], piece: Callable[[str], bytes], *, hidden: frozenset[int]
    ) -> None:
        super().__init__()
        self._spelling = spelling
        self._piece = piece
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        """Bytes of an id seen for the first time; those outside the vocabulary are not remembered."""
        token = self._spelling(token_id)
        if token is None:
            return b""
        data = b"" if token_id in self._hidden else self._piece(token)
        self[token_id] = data
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceDecoder:
    """Turns a vocabulary's strings into bytes, and says whether a text loses its first space."""

    piece: Callable[[str], bytes]
    drops_first_space: bool


def piece_decoder(backend: tokenizers.Tokenizer) -> PieceDecoder:
    """The decoder of a `tokenizers.Tokenizer`, as bytes per token.

    Raises ModelError, naming it, for a decoder that is of neither family.
    """
    decoder = backend.decoder
    spec: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    stages: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return PieceDecoder(piece=_byte_level_piece, drops_first_space=False)
    if stages and stages[0] == _SPACE_STAGE:
        kinds = [stage["type"] for stage in stages[1:]]
        piece = _byte_fallback_piece if "ByteFallback" in kinds else _space_piece
        rest = [kind for kind in kinds if kind != "ByteFallback"]
        if rest in ([], ["Fuse"]):
            return PieceDecoder(piece=piece, drops_first_space=False)
        if rest == ["Fuse", "Strip"] and stages[-1] == _STRIP_STAGE:
            return PieceDecoder(piece=piece, drops_first_space=True)
    raise ModelError(
        f"the tokenizer's decoder {json.dumps(spec, ensure_ascii=False)} is not supported; those known are "
        "ByteLevel, and Replace (▁ by a space) with ByteFallback, Fuse and Strip (of one leading space)"
    )


_SPACE_STAGE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_STRIP_STAGE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 spells itself, the other bytes the characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
"""The byte that each character of a byte-level vocabulary spells."""


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(map(BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # an added token, which is plain text
        return token.encode()


def _space_piece(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _byte_fallback_piece(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return _space_piece(token)
