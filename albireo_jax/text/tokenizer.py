"""Text to token ids and back, for a Hugging Face folder or a GGUF file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.model_files import ModelFiles, ModelFormat
from albireo_jax.text.chat_template import ChatTemplate
from albireo_jax.text.gguf_tokenizer import load_gguf_tokenizer
from albireo_jax.text.hf_tokenizer import load_hf_tokenizer
from albireo_jax.text.length_bounds import text_bound
from albireo_jax.text.token_bytes import MAX_TOKEN_ID, TokenBytes, piece_decoder
from albireo_jax.text.tokenizer_parts import TokenizerParts

_LOADERS = {
    ModelFormat.HF_FOLDER: load_hf_tokenizer,
    ModelFormat.ORBAX: load_hf_tokenizer,
    ModelFormat.GGUF: load_gguf_tokenizer,
}


class Tokenizer:
    """A model's tokenizer: encoding, decoding, and its chat template.

    Safe to share between threads.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        """Wrap what a loader read. Raises ModelError if the decoder is of an unknown kind."""
        self._backend = parts.backend
        self._respelled = parts.respelled
        self._bos_token_id = parts.bos_token_id
        self._eos_token_ids = parts.eos_token_ids
        self._chat_template = ChatTemplate(parts.chat_templates, special_tokens=parts.special_tokens)
        decoder = piece_decoder(parts.backend)
        added = parts.backend.get_added_tokens_decoder()
        special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._all_bytes = TokenBytes(self.token_text, decoder.piece, hidden=frozenset())
        self._shown_bytes: dict[tuple[str, ...], TokenBytes] = {}  # by `shown`
        self._piece = decoder.piece
        self._special = special
        self._drops_first_space = decoder.drops_first_space
        self._bound = text_bound(parts.backend)

    @classmethod
    def from_files(cls, files: ModelFiles) -> "Tokenizer":
        """The tokenizer of a model on disk.

        Raises ModelError if there is none, or if it is of a kind that is not known.
        """
        return cls(_LOADERS[files.format](files.path))

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows; a model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text or an answer, as the tokenizer's files have them; the main one first."""
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat_template.exists

    @property
    def chat_template_source(self) -> str:
        """The template that renders conversations with tools; empty if there is none."""
        return self._chat_template.source

    @property
    def renders_fast(self) -> bool:
        """Whether conversations like the latest are rendered in little time."""
        return self._chat_template.renders_fast

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding drops one space at the very beginning of a text, as SentencePiece does."""
        return self._drops_first_space

    def encode(
        self, text: str, *, add_special_tokens: bool = True, context_len: int | None = None
    ) -> list[int]:
        """Token ids of `text`; with the beginning (or end) token where the model wants one.

        Special tokens spelled out in the text become their ids. Other threads go on meanwhile. Raises
        ValueError for half a surrogate pair, which is no character, and ContextLengthError for a text that
        must fill a sequence of `context_len` tokens: it is refused before the work is done.
        """
        try:
            fewest = 0 if self._bound is None else self._bound.fewest_tokens(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"cannot encode {text!r:.80}: it does not consist of characters") from error
        if context_len is not None and fewest >= context_len:
            raise ContextLengthError(
                context_len, f"the text has {len(text)} characters, which are at least {fewest} tokens"
            )
        try:  # not `encode`, which holds the interpreter and works out offsets
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError(f"cannot encode {text!r:.80}: it does not consist of characters") from error
        return encoding.ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside the vocabulary are skipped, ill-formed UTF-8 gives U+FFFD."""
        pieces = self.token_bytes(skip_special_tokens=skip_special_tokens)
        data = b"".join(map(pieces.__getitem__, token_ids))
        if self._drops_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, *, skip_special_tokens: bool = True, shown: tuple[str, ...] = ()) -> TokenBytes:
        """Table from token id to the bytes that it adds to a text; never skipping those in `shown`."""
        if not skip_special_tokens:
            return self._all_bytes
        if shown not in self._shown_bytes:
            hidden = self._special - {self.token_id(text) for text in shown}
            self._shown_bytes[shown] = TokenBytes(self.token_text, self._piece, hidden=hidden)
        return self._shown_bytes[shown]

    def is_special(self, token_id: int) -> bool:
        """Whether a token is hidden from texts by default."""
        return token_id in self._special

    def special_tokens_in(self, texts: Sequence[str]) -> dict[int, str]:
        """Special tokens that are spelled out in any of `texts`, and their spelling."""
        if not texts:
            return {}
        spellings = {
            token_id: self._all_bytes[token_id].decode("utf-8", "replace") for token_id in self._special
        }
        return {
            token_id: spelling
            for token_id, spelling in sorted(spellings.items())
            if spelling and any(spelling in text for text in texts)
        }

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, None outside the vocabulary."""
        if token_id in self._respelled:
            return self._respelled[token_id]
        return self._backend.id_to_token(token_id) if 0 <= token_id <= MAX_TOKEN_ID else None

    def token_id(self, text: str) -> int | None:
        """Id of a token by the vocabulary's own spelling, None if there is none."""
        return self._backend.token_to_id(text)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the prompt that the model was trained on; see `ChatTemplate.render`."""
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        context_len: int | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a rendered conversation; the template itself writes the beginning token.

        Raises as `apply_chat_template` and `encode` do.
        """
        text = self.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )
        return self.encode(text, add_special_tokens=False, context_len=context_len)
