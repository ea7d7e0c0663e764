"""Tokenizers of few tokens, made for characters that are cut into pieces."""

from albireo_jax.core.gguf_metadata import MetadataValue
from albireo_jax.text.gguf_tokenizer import TokenType, parts_from_metadata
from albireo_jax.text.tokenizer import Tokenizer

WORDS = ["a", "b", "ab", "abc", "é", "你", "🙂", "\n", " the", " a", "▁", "<", "</s"]


def _sentencepiece() -> Tokenizer:
    """Characters, words and bytes: an 🙂 can come as one token, as bytes, or as part of them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    words = list(dict.fromkeys(word.replace(" ", "▁") for word in WORDS))
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds] + [1] * len(words),
        "tokenizer.ggml.scores": [0.0] * (len(tokens) + len(words)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Tokenizer(parts_from_metadata(metadata))


def _byte_level() -> Tokenizer:
    """Every byte, a few whole words, and pieces that end inside a character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    pieces = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    pieces += ["🙂".encode()[:2], "🙂".encode()[2:], "你".encode()[:1], "é".encode()[1:] + b"a"]
    tokens = list(dict.fromkeys("".join(spelling[byte] for byte in piece) for piece in pieces))
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.tokens": [*tokens, "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [int(TokenType.CONTROL)],
        "tokenizer.ggml.eos_token_id": len(tokens),
    }
    return Tokenizer(parts_from_metadata(metadata))


TOKENIZERS = {"sentencepiece": _sentencepiece(), "byte_level": _byte_level()}
