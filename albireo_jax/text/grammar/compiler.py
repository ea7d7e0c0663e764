"""Structured output: from a schema, a regular expression or a grammar to the tokens that may come next.

A grammar is written in llguidance's notation (see `notation`), tried in a process of its own
(see `grammar_trials`), compiled here, and kept; each request then gets a constraint that starts from a
copy. All of that happens in the thread that calls. What is left is a mask per token, mostly some
10 µs; see `mask_threads`.

The mask allows what the bytes of the tokens allow, however the text is cut into tokens. Special tokens are
allowed only where a grammar names them, the end-of-sequence ids where the answer may end.
"""

import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import llguidance
import numpy as np

from albireo_jax.core.errors import ConstraintError
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import StructuredOutput
from albireo_jax.text.bounded_cache import BoundedCache
from albireo_jax.text.grammar.notation import MAX_TEXT_BYTES, library_grammar, size_of, wish_name
from albireo_jax.text.grammar.sandbox import TOO_COMPLEX, GrammarSandbox
from albireo_jax.text.grammar.sandbox_process import Vocabulary, compile_grammar, next_mask
from albireo_jax.text.tokenizer import Tokenizer

__all__ = ["MAX_TEXT_BYTES", "Grammar", "GrammarCompiler", "GrammarConstraint"]

_MAX_GRAMMARS, _MAX_REFUSALS = 64, 256
_MAX_KEPT_BYTES = 8 * 2**20  # of texts, in each of the two
_MAX_MESSAGE = 500


class GrammarCompiler:
    """Compiles what callers ask for against one vocabulary; any thread may call it.

    `vocab_size` is the model's; ids that are no token of the tokenizer are never allowed. Grammars compiled
    lately are kept by their text, and so is what was wrong with those that did not compile. The first call
    takes a second.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        eos = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        if not eos:
            raise ValueError(f"no end-of-sequence id among {list(eos_token_ids)} is below {vocab_size}")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos
        self._lock = threading.Lock()  # guards the four below
        self._workshop: _Workshop | None = None
        self._grammars = BoundedCache[StructuredOutput, Grammar](_MAX_GRAMMARS, max_bytes=_MAX_KEPT_BYTES)
        self._refusals = BoundedCache[StructuredOutput, str](_MAX_REFUSALS, max_bytes=_MAX_KEPT_BYTES)
        self._open: dict[StructuredOutput, Future[Grammar]] = {}  # being compiled

    def find(self, structured: StructuredOutput) -> "Grammar | None":
        """The grammar of `structured` if it was compiled lately; returns at once."""
        with self._lock:
            return self._grammars.get(structured)

    def compile(self, structured: StructuredOutput) -> "Grammar":
        """The grammar of `structured`, in seconds at most.

        Raises ValueError, saying what is wrong and where, for what is malformed, not supported, or too
        complex, and OverloadedError if that cannot be found out now.
        """
        num_bytes = size_of(structured)
        with self._lock:
            grammar, refusal = self._grammars.get(structured), self._refusals.get(structured)
            if grammar is not None:
                return grammar
            if refusal is not None:
                raise ValueError(refusal)
            future = self._open.get(structured)
            if future is None:
                self._open[structured] = Future()
                self._workshop = self._workshop or self._set_up()
        return self._compile(structured, num_bytes=num_bytes) if future is None else future.result()

    def _compile(self, structured: StructuredOutput, *, num_bytes: int) -> "Grammar":
        """Compile `structured`, which is open, and tell those who wait for it."""
        assert self._workshop is not None
        try:
            grammar = _compiled(structured, self._workshop)
        except BaseException as error:
            with self._lock:
                if isinstance(error, ValueError):  # the others say nothing about the grammar
                    self._refusals.put(structured, str(error), num_bytes=num_bytes)
                future = self._open.pop(structured)
            future.set_exception(error)
            raise
        with self._lock:
            self._grammars.put(structured, grammar, num_bytes=num_bytes)
            future = self._open.pop(structured)
        future.set_result(grammar)
        return grammar

    def _set_up(self) -> "_Workshop":
        spelled = self._tokenizer.token_bytes(skip_special_tokens=False)
        shown = self._tokenizer.token_bytes(skip_special_tokens=True)
        tokens = [spelled[token_id] for token_id in range(self._vocab_size)]
        special = [token_id for token_id, data in enumerate(tokens) if data and not shown[token_id]]
        vocabulary = Vocabulary(tokens, special_token_ids=special, eos_token_ids=self._eos_token_ids)
        eos = _words(self._eos_token_ids, self._vocab_size)
        known = _words([token_id for token_id, data in enumerate(tokens) if data], self._vocab_size)
        return _Workshop(trie=vocabulary.trie(), trial=GrammarSandbox(vocabulary), known=known | eos, eos=eos)


def grammar_compiler(
    tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]
) -> GrammarCompiler | None:
    """A compiler for a model; None for one without an end-of-sequence id, whose answers could not end."""
    eos = [token_id for token_id in eos_token_ids if token_id < vocab_size]
    return GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=eos) if eos else None


class Grammar:
    """A compiled grammar: the constraints of any number of requests start from it, in any thread."""

    def __init__(self, matcher: llguidance.LLMatcher, *, known: Int32s, eos: Int32s) -> None:
        self._matcher = matcher
        self._known = known
        self._eos = eos
        self._first = next_mask(matcher, 32 * len(known))

    def constraint(self, *, ignore_eos: bool = False) -> "GrammarConstraint":
        """A constraint at the beginning of an answer.

        With `ignore_eos` end-of-sequence ids are never allowed: the answer goes on as long as it can.
        """
        allowed = self._allowed(ignore_eos=ignore_eos)
        return GrammarConstraint(self._matcher.deep_copy(), allowed=allowed, first=self._first)

    def first_mask(self) -> Int32s:
        """Words of the tokens that an answer may begin with, as in `TokenConstraint.mask`."""
        return self._first & self._known

    def _allowed(self, *, ignore_eos: bool) -> Int32s:
        return self._known & ~self._eos if ignore_eos else self._known


class GrammarConstraint:
    """A `TokenConstraint`: how far one answer has come in its grammar.

    The mask of its first token is `first`, made when the grammar was compiled.
    """

    def __init__(self, matcher: llguidance.LLMatcher, *, allowed: Int32s, first: Int32s) -> None:
        self._matcher = matcher
        self._allowed = allowed
        self._first: Int32s | None = first

    def mask(self) -> Int32s:
        """Fresh words of the tokens that may come next; raises ConstraintError if that is too complex."""
        if self._first is not None:
            return self._first & self._allowed
        words = next_mask(self._matcher, 32 * len(self._allowed))
        self._check()
        return words & self._allowed

    def advance(self, token_id: int) -> None:
        """Take in a token that the mask allowed; raises ConstraintError if that is too complex."""
        self._first = None
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"the grammar cannot be followed: {_message(self._matcher.get_error())}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workshop:
    """The tools that compile grammars: the vocabulary as a tree, the trial, masks of known and end tokens."""

    trie: llguidance.LLTokenizer
    trial: GrammarSandbox
    known: Int32s
    eos: Int32s


def _compiled(structured: StructuredOutput, workshop: _Workshop) -> Grammar:
    """The grammar; ValueError says what is wrong with it, or with a part that is wrong by itself."""
    text = library_grammar(structured)
    error = workshop.trial.check(text)
    if error is not None:
        if not error.startswith(TOO_COMPLEX):
            for part in structured.parts:
                _compiled(part, workshop)
        raise ValueError(f"{wish_name(structured)}: {_message(error)}")
    matcher = compile_grammar(workshop.trie, text)
    if matcher.is_error():
        raise ValueError(f"{wish_name(structured)}: {_message(matcher.get_error())}")
    return Grammar(matcher, known=workshop.known, eos=workshop.eos)


def _message(error: str) -> str:
    """An error of llguidance on one line, without the excerpt of the grammar that it ends with."""
    told = re.split(r"\n +\d+ \| ", error.replace("<non-verbose/>", ""))[0]
    told = told.replace("NoExtensionBias", "it comes to a place where no token can follow")
    return " ".join(told.split())[:_MAX_MESSAGE]


def _words(token_ids: Sequence[int], vocab_size: int) -> Int32s:
    """Mask of `token_ids`."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
