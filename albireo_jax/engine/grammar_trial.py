"""A process in which grammars are tried before the engine takes them in, and which may die of them.

The limits of llguidance bound most of what a grammar costs, not all of it: 3,000 rules that name one another
overflow the stack, which kills a process, and an intersection of 40 short patterns computes for minutes.
So a grammar is first compiled, and a few answers are drawn from it at random, in a process of its own with
less time, stack and memory than there is here. It is started for the first grammar, and anew after one
that it did not survive. What runs there is this file alone: it imports nothing of this package.
"""

import contextlib
import json
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np

_TRIAL_S = 3.0
_START_S = 60.0
_STACK_BYTES = 2 * 2**20  # a quarter of what threads have here
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


class GrammarTrial:
    """Tries grammars in the other process; any thread may call it, one at a time is served."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end = weakref.finalize(self, _nothing)

    def check(self, grammar: str) -> str | None:
        """What is wrong with `grammar`, in llguidance's words, or None.

        Takes seconds at most: a grammar that takes longer, or kills the process, is too complex.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            answer = _ask(self._process, grammar, limit_s=_TRIAL_S)
        if answer is None:
            return f"too complex: it takes more than {_TRIAL_S:g} s, or more memory or stack than it may"
        return answer or None

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end()  # of the process before
        self._end = weakref.finalize(self, _stop, process)
        if _ask(process, vars(self._vocabulary), limit_s=_START_S) != _SURVIVED:
            _stop(process)
            raise RuntimeError("the process that tries grammars does not start")
        return process


def _ask(process: subprocess.Popen[bytes], message: object, *, limit_s: float) -> str | None:
    """The answer to `message`; None if there is none in time, and then the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        pickle.dump(message, process.stdin)
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = b""
    finally:
        timer.cancel()
    if not answer.endswith(b"\n"):
        _stop(process)
        return None
    return json.loads(answer)


def _nothing() -> None:
    """What there is to end before the first process."""


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be written is of no interest
                pipe.close()


# The other process.


def _serve() -> None:
    """Answer grammar after grammar, after the vocabulary, until there are no more."""
    trie: llguidance.LLTokenizer | None = None
    with contextlib.suppress(EOFError):
        while True:
            message = pickle.load(sys.stdin.buffer)
            if trie is None:
                trie, answer = Vocabulary(**message).trie(), _SURVIVED
            else:
                answer = _try(trie, message)
            print(json.dumps(answer), flush=True)  # noqa: T201


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
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    _limit_process()
    threading.stack_size(_STACK_BYTES)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()
