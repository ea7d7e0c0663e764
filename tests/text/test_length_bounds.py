"""A text is refused as too long before it is tokenized only if it is too long."""

import gzip
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.model_files import find_model
from albireo_jax.text.hf_tokenizer import load_hf_tokenizer
from albireo_jax.text.length_bounds import text_bound
from albireo_jax.text.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [" " * 100, "\n" * 50, "a" * 80, "\u212a" * 20, "e\u0301" * 9, "<s>   ", "가" * 9, "\U0001f642"]
        ),
        st.characters(categories=["Lo", "Mn", "Sk"]),
    ),
    max_size=12,
).map("".join)


def _byte_level(*, known: list[str] = BYTES, added: AddedToken | None = None) -> tokenizers.Tokenizer:
    vocab = {piece: i for i, piece in enumerate([*known, "aa", "aaaa", "ĠĠ"])}
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "Ġ")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if added is not None:
        backend.add_special_tokens([added])
    return backend


def _sentence_piece() -> tokenizers.Tokenizer:
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "aa", "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("a", "a"), ("▁", "▁")],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def _composing() -> tokenizers.Tokenizer:
    backend = _byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


@cache
def _smollm2() -> Tokenizer:
    return Tokenizer.from_files(find_model("smollm2"))


BACKENDS = {
    "bytes": _byte_level(),
    "some bytes": _byte_level(known=[*BYTES[:150], "Ġ"]),
    "swallowed spaces": _byte_level(added=AddedToken("<s>", lstrip=True, rstrip=True, special=True)),
    "SentencePiece": _sentence_piece(),
    "NFC": _composing(),
}


@pytest.mark.parametrize("name", BACKENDS)
@given(text=TEXTS)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_no_text_has_fewer_tokens_than_its_bound(name: str, text: str) -> None:
    backend = BACKENDS[name]
    bound = text_bound(backend)
    assert bound is not None
    assert bound.fewest_tokens(text) <= len(backend.encode(text, add_special_tokens=False).ids)


@given(text=TEXTS)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_bound_of_a_real_tokenizer_holds_and_its_ids_are_those_of_encode(text: str) -> None:
    tokenizer = _smollm2()
    token_ids = tokenizer._backend.encode(text).ids
    assert tokenizer.encode(text) == token_ids
    assert tokenizer.encode(text, context_len=len(token_ids) + 1) == token_ids


def test_real_tokenizers_have_a_bound(data_dir: Path, tmp_path: Path) -> None:
    for packed in (data_dir / "tokenizers" / "qwen3").glob("*.gz"):
        (tmp_path / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    assert text_bound(load_hf_tokenizer(tmp_path).backend) is not None
    stories = load_hf_tokenizer(data_dir / "models" / "stories260k")
    assert text_bound(stories.backend) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace("aaaa", "a")},
        {"normalizer": normalizers.NFKC()},
        {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
        {"pre_tokenizer": pre_tokenizers.Split(" ", "removed")},
        {"pre_tokenizer": pre_tokenizers.CharDelimiterSplit("a")},
        {"model": models.Unigram([("a", 0.0)], unk_id=0)},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
    ],
)
def test_there_is_no_bound_where_text_might_be_dropped(change: dict[str, object]) -> None:
    backend = _byte_level()
    for name, part in change.items():
        setattr(backend, name, part)
    assert text_bound(backend) is None


def test_a_text_that_cannot_fit_is_refused_and_one_that_might_is_not() -> None:
    tokenizer = _smollm2()
    longest = " " * 64
    for length in (1, 100, 3_000_000):
        with pytest.raises(ContextLengthError, match="maximum context length is 10 tokens"):
            tokenizer.encode("x" * length + longest * 1000, context_len=10)
    assert len(tokenizer.encode(longest * 5, context_len=10)) < 10
    for text in ("\ud800", "a\udfffb"):
        with pytest.raises(ValueError, match="does not consist of characters"):
            tokenizer.encode(text)
