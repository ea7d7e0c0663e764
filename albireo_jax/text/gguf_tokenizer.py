"""A tokenizer rebuilt from a GGUF file's metadata.

Two vocabularies are known: `gpt2` (byte-level pairs merged by rank, cut first by a named pre-tokenizer) and
`llama` (SentencePiece pairs merged by score, with bytes for unknown characters). Keys and defaults follow
llama.cpp (src/llama-vocab.cpp).
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import decoders, models, normalizers

from albireo_jax.core.errors import ModelError
from albireo_jax.core.gguf_metadata import MetadataValue, read_gguf_metadata
from albireo_jax.text.pretokenizers import find_pre_tokenizer
from albireo_jax.text.tokenizer_parts import TokenizerParts, set_affixes

_logger = logging.getLogger(__name__)
_TEMPLATE = "tokenizer.chat_template"
_Item = TypeVar("_Item", str, int, float)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`: what a token is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_END_OF_TURN = frozenset(
    {
        *("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>", "<end_of_utterance>"),
        *("<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
    }
)
"""Tokens that end an answer even where the metadata does not say so.

llama.cpp has </s> too, which is an ordinary word of Qwen3's vocabulary; here it ends where a key says so.
"""

_MIDDLE = frozenset(
    {
        *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|fim_repo|>"),
        *("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>", "<fim-repo>"),
        *("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<reponame>"),
        *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
        *("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", "<|prefix|>", "<|suffix|>", "<|middle|>"),
        *("<PRE>", "<SUF>", "<MID>", "<PAD>", "<REPO>", "\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "[PAD]"),
        *("<|repo_name|>", "<|file_sep|>"),
    }
)
"""Tokens of prompts that ask for the middle of a text."""

_NAMED_TOKENS = tuple(f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))
_CONTROL_LOOK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


def load_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Rebuild the tokenizer that the file describes.

    Raises ModelError for a vocabulary or pre-tokenizer that is not known (it lists those that are), and for
    metadata that is missing or does not fit together.
    """
    metadata = read_gguf_metadata(path)
    try:
        return parts_from_metadata(metadata)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def parts_from_metadata(metadata: dict[str, MetadataValue]) -> TokenizerParts:
    """Rebuild the tokenizer that a GGUF file's keys and values describe; see `load_gguf_tokenizer`."""
    return _Vocabulary(metadata).parts()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """An empty tokenizer, and whether it begins a text with the beginning token unless told."""

    backend: tokenizers.Tokenizer
    adds_bos: bool


class _Vocabulary:
    """The tokens of a file with their types, and the tokenizer made of them."""

    def __init__(self, metadata: dict[str, MetadataValue]) -> None:
        self._metadata = metadata
        tokens = self._list("tokens", str)
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.types = self._list("token_type", int) if self._has("token_type") else [1] * len(tokens)
        if len(self.types) != len(tokens):
            raise ModelError(f"{len(tokens)} tokens have {len(self.types)} types")
        self._respelled: dict[int, str] = {}
        self.ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if token in self.ids:  # texts become the first; the model may still say the others
                self._respelled[i] = token
                self.tokens[i] = token = f"\ufdd0{i}\ufdd0"  # no text has these characters
            self.ids[token] = i
        if self._respelled:
            _logger.warning("the vocabulary has tokens twice: %r", [*self._respelled.values()][:5])
        self._retype()

    def parts(self) -> TokenizerParts:
        """The tokenizer with its added tokens, beginning and end tokens, and chat templates."""
        model = self._text("model")
        if model not in _MODELS:
            raise ModelError(
                f"the tokenizer model {model!r} is not supported; those known are {list(_MODELS)}"
            )
        try:
            built = _MODELS[model](self)
        except ModelError:
            raise
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ModelError(f"its vocabulary and merges do not fit together: {error}") from error
        self._add_tokens(built.backend)
        bos, eos = self._token("bos_token_id"), self._token("eos_token_id")
        set_affixes(
            built.backend,
            bos=bos if self._flag("add_bos_token", default=built.adds_bos) else None,
            eos=eos if self._flag("add_eos_token", default=False) else None,
        )
        unknown, padding = self._token("unknown_token_id"), self._token("padding_token_id")
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "pad_token": padding}
        return TokenizerParts(
            backend=built.backend,
            bos_token_id=None if bos is None else self.ids[bos],
            eos_token_ids=self._end_ids(),
            special_tokens={name: text for name, text in named.items() if text is not None},
            chat_templates=self._templates(),
            respelled=self._respelled,
        )

    def merges(self) -> list[tuple[str, str]]:
        """Pairs to merge, best first, as the file lists them."""
        pairs: list[tuple[str, str]] = []
        for merge in self._list("merges", str):
            left, space, right = merge.partition(" ")
            if not (left and space and right):
                raise ModelError(f"the merge {merge!r} is not a pair")
            pairs.append((left, right))
        return pairs

    def merges_by_score(self) -> list[tuple[str, str]]:
        """Pairs whose concatenation is a token, that of the highest score first.

        SentencePiece merges whatever two neighbours make the best token, so each way to cut a token in
        two is a merge; among equals, longer left halves first, as transformers' converters have it.
        """
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise ModelError(f"{len(self.tokens)} tokens have {len(scores)} scores")
        mergeable = {
            token: score
            for token, kind, score in zip(self.tokens, self.types, scores, strict=True)
            if kind in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        }
        ranked = [
            (-score, -cut, token)
            for token, score in mergeable.items()
            for cut in range(1, len(token))
            if token[:cut] in mergeable and token[cut:] in mergeable
        ]
        ranked.sort(key=lambda merge: merge[:2])
        return [(token[:-negative], token[-negative:]) for _, negative, token in ranked]

    def pre_tokenizer_name(self) -> str:
        """The name of the pre-tokenizer; files older than the key have the default one."""
        return self._text("pre") if self._has("pre") else "default"

    def unknown_token(self) -> str | None:
        """The token for characters that the vocabulary has neither whole nor in bytes."""
        of_type = [
            token for token, kind in zip(self.tokens, self.types, strict=True) if kind == TokenType.UNKNOWN
        ]
        return self._token("unknown_token_id") or next(iter(of_type), None)

    def adds_space_prefix(self) -> bool:
        """Whether a text, and what follows a special token, begins with a space."""
        return self._flag("add_space_prefix", default=True)

    def _retype(self) -> None:
        """Make control tokens of those that are typed as text but are ones by their names, as llama.cpp does.

        Those that a key of the metadata names are control tokens too if they look like it.
        """
        named = {self._token(name) for name in _NAMED_TOKENS}
        special = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        changed = [
            text
            for text, i in self.ids.items()
            if self.types[i] not in special
            and (text in _END_OF_TURN or text in _MIDDLE or (text in named and _CONTROL_LOOK.fullmatch(text)))
        ]
        for text in changed:
            self.types[self.ids[text]] = TokenType.CONTROL
        if changed:
            _logger.warning("the file types %s as text; they are taken as control tokens", ", ".join(changed))

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Make control, unknown and user-defined tokens match in a text before anything else does."""
        special_kinds = (TokenType.CONTROL, TokenType.UNKNOWN)
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind in special_kinds)
                for token, kind in zip(self.tokens, self.types, strict=True)
                if kind in (*special_kinds, TokenType.USER_DEFINED)
            ]
        )

    def _end_ids(self) -> tuple[int, ...]:
        ends = [self._token(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        added = (TokenType.CONTROL, TokenType.USER_DEFINED)
        ends += [text for text in self.tokens if text in _END_OF_TURN and self.types[self.ids[text]] in added]
        # In gpt-oss and its like <|end|> ends a message, not the answer.
        if ("<|return|>" in ends and "<|call|>" in ends) or ("<|calls|>" in ends and "<|flush|>" in ends):
            ends = [text for text in ends if text != "<|end|>"]
        return tuple(dict.fromkeys(self.ids[text] for text in ends if text is not None))

    def _templates(self) -> dict[str, str]:
        templates: dict[str, str] = {}
        for key, value in self._metadata.items():
            if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
                if not isinstance(value, str):
                    raise ModelError(f"{key} is not a text: {value!r:.100}")
                templates[key[len(_TEMPLATE) + 1 :] or "default"] = value
        return templates

    def _has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self._metadata

    def _value(self, name: str) -> MetadataValue:
        key = f"tokenizer.ggml.{name}"
        if key not in self._metadata:
            raise ModelError(f"the metadata has no {key}")
        return self._metadata[key]

    def _text(self, name: str) -> str:
        value = self._value(name)
        if not isinstance(value, str):
            raise ModelError(f"tokenizer.ggml.{name} is not a text: {value!r}")
        return value

    def _flag(self, name: str, *, default: bool) -> bool:
        return bool(self._value(name)) if self._has(name) else default

    def _token(self, name: str) -> str | None:
        """Text of the token whose id is stored under `name`, None if the key is missing."""
        if not self._has(name):
            return None
        value = self._value(name)
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise ModelError(
                f"tokenizer.ggml.{name} {value!r} is outside the vocabulary of {len(self.tokens)}"
            )
        return self.tokens[value]

    def _list(self, name: str, item: type[_Item]) -> list[_Item]:
        value = self._value(name)
        if not isinstance(value, list) or (value and not isinstance(value[0], item)):
            raise ModelError(f"tokenizer.ggml.{name} is not a list of {item.__name__}")
        elements = [element for element in value if isinstance(element, item)]
        if item is str and not _is_utf8("".join(map(str, elements))):
            wrong = next(i for i, element in enumerate(elements) if not _is_utf8(str(element)))
            raise ModelError(f"tokenizer.ggml.{name}[{wrong}] is no UTF-8: {elements[wrong]!r}")
        return elements


def _is_utf8(text: str) -> bool:
    """Whether a text of a file holds characters alone; bytes that are none were read as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _byte_level_model(vocabulary: _Vocabulary) -> _Model:
    pre_tokenizer = find_pre_tokenizer(vocabulary.pre_tokenizer_name())
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=pre_tokenizer.ignores_merges
        )
    )
    normalizer = pre_tokenizer.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer.splitter()
    backend.decoder = decoders.ByteLevel()
    return _Model(backend=backend, adds_bos=pre_tokenizer.adds_bos)


def _sentencepiece_model(vocabulary: _Vocabulary) -> _Model:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=vocabulary.merges_by_score(),
            unk_token=vocabulary.unknown_token(),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    stages: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds_space_prefix():
        spaces.insert(0, normalizers.Prepend("▁"))
        stages.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(stages)
    return _Model(backend=backend, adds_bos=True)


_MODELS: dict[str, Callable[[_Vocabulary], _Model]] = {
    "gpt2": _byte_level_model,
    "llama": _sentencepiece_model,
}
