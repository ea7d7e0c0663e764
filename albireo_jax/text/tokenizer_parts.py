"""A model's tokenizer as read from its files, in one form for all formats."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers
from tokenizers import processors


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """A tokenizer as read from files.

    `special_tokens` are the texts that chat templates name (`bos_token`, `eos_token`, …);
    `chat_templates` are Jinja sources by name, `default` first among them. `respelled` are the texts of ids
    that `backend` knows by another spelling, since each of its spellings has one id.
    """

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    respelled: Mapping[int, str] = field(default_factory=dict[int, str])


def set_affixes(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make `backend` put the token `bos` before an encoded text and `eos` after it."""
    affixes = [text for text in (bos, eos) if text is not None]
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(piece.replace("$A", "$B") for piece in single)],
        special_tokens=[(text, backend.token_to_id(text)) for text in affixes],
    )
