"""The program of a process that tries grammars, and may die of them.

The process keeps the vocabulary and forks for each grammar. The fork compiles it and draws a few answers from
it at random, with less stack and memory than there is in the engine, and within a limit of *processor* time:
a machine that is busy makes no grammar complex. This file imports nothing of the package, because it is run
as it is; `grammar_trials` starts it.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Sequence

import llguidance
import llguidance.numpy
import numpy as np

TIMED_OUT = -signal.SIGPROF
"""Code of a fork that used up its processor time; other negative codes are of other signals."""

_STACK_BYTES = 2 * 2**20  # a quarter of what threads have in the engine
_MEMORY_BYTES = 4 * 2**30
_WALKS, _WALK_TOKENS = 3, 32
_SURVIVED = ""


class Vocabulary:
    """The bytes of each token, as llguidance wants them; ids that are no token have none.

    It never tokenizes: all grammars leave it to the model how a text is cut into tokens, so that the mask is
    what the grammar allows and no more is asked of the tokenizer than its bytes.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], *, special_token_ids: Sequence[int], eos_token_ids: Sequence[int]
    ) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = list(special_token_ids)
        self.eos_token_ids = list(eos_token_ids)

    @property
    def eos_token_id(self) -> int:
        """The main id that ends a text."""
        return self.eos_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        """Never called, because nothing is forced."""
        raise AssertionError(f"a grammar asked for the tokens of {text!r:.80}")

    def trie(self) -> llguidance.LLTokenizer:
        """The tokens as the tree that masks are made from."""
        return llguidance.LLTokenizer(self, eos_token=self.eos_token_ids)  # type: ignore[arg-type]


def compile_grammar(trie: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of `grammar`, its first mask made; it may be in error.

    The limits are lower than llguidance's own: the worst grammars take 25 ms a step, where 0.01 ms is usual.
    """
    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=50_000,
        step_max_items=5_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )
    matcher = llguidance.LLMatcher(trie, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        next_mask(matcher, trie.vocab_size)
    return matcher


def next_mask(matcher: llguidance.LLMatcher, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Words of the tokens that may come next; meaningless if the matcher is in error then."""
    words = np.empty((1, -(-vocab_size // 32)), np.int32)
    llguidance.numpy.fill_next_token_bitmask(matcher, words)
    return words[0]


# The other process.


def _serve() -> None:
    """Answer grammar after grammar, after the vocabulary, until there are no more.

    A message is a grammar and its limit in seconds, an answer the code of the fork and the error found.
    """
    trie: llguidance.LLTokenizer | None = None
    with contextlib.suppress(EOFError):
        while True:
            message = pickle.load(sys.stdin.buffer)
            if trie is None:
                trie, answer = Vocabulary(**message).trie(), (0, _SURVIVED)
            else:
                answer = _try_in_fork(trie, *message)
            print(json.dumps(answer), flush=True)  # noqa: T201


def _try_in_fork(trie: llguidance.LLTokenizer, grammar: str, limit_s: float) -> tuple[int, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # of processor time; its signal ends the fork
        os.write(writing, _try(trie, grammar).encode()[: 2**15])  # what a pipe takes without a reader
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        error = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), error


def _try(trie: llguidance.LLTokenizer, grammar: str) -> str:
    """Compile `grammar` and draw answers from it; the error if there is one."""
    matcher = compile_grammar(trie, grammar)
    random = np.random.default_rng(0)
    for _ in range(_WALKS):
        walker = matcher.deep_copy()
        for _ in range(_WALK_TOKENS):
            mask = next_mask(walker, trie.vocab_size)
            if walker.is_error() or walker.is_stopped():
                break
            token_ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            walker.consume_token(int(random.choice(token_ids)))
        if walker.is_error():
            return walker.get_error() or "no token may come next"
    return _SURVIVED


def _limit_process() -> None:
    """Limits for the forks, and for this process, which needs less."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))


if __name__ == "__main__":
    _limit_process()
    _serve()
