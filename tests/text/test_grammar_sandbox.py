"""Hard grammars hold up no others, and a machine that is busy makes no grammar wrong."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from albireo_jax.core.errors import OverloadedError
from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.text.bounded_cache import BoundedCache
from albireo_jax.text.grammar.compiler import GrammarCompiler
from albireo_jax.text.grammar.sandbox import GrammarSandbox
from albireo_jax.text.grammar.sandbox_process import Vocabulary
from albireo_jax.text.tokenizer import Tokenizer

HARD = " & ".join(f"/.*a{{}}x{k}.*/" for k in range(40))


def _lark(text: str) -> str:
    options = '\n%llguidance {"no_forcing": true}\n'
    return json.dumps({"grammars": [{"lark_grammar": text + options}]})


def _hard(number: int) -> str:
    return f"start: A\nA: {HARD.replace('{}', str(number))}"


@pytest.fixture
def trial() -> GrammarSandbox:
    tokens = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    return GrammarSandbox(Vocabulary(tokens, special_token_ids=[256], eos_token_ids=[256]))


@pytest.fixture
def compiler(data_dir: Path) -> GrammarCompiler:
    tokenizer = Tokenizer.from_files(find_model(str(data_dir / "models" / "stories260k")))
    return GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


def test_easy_grammars_do_not_wait_for_hard_ones(
    trial: GrammarSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("albireo_jax.text.grammar.sandbox._SLOW_S", 1.0)
    assert trial.check(_lark('start: "a"')) is None
    with ThreadPoolExecutor(5) as pool:
        hard = [pool.submit(trial.check, _lark(_hard(i))) for i in range(2)]
        easy = [pool.submit(trial.check, _lark(f'start: "b{i}"')) for i in range(4)]
        assert [one.result() for one in easy] == [None] * 4
        assert not all(one.done() for one in hard)
        messages = [one.result() for one in hard]
    assert all(message is not None and "1 s of processor time" in message for message in messages)
    assert trial.check(_lark('start: "c"')) is None


def test_a_stall_is_no_verdict_on_a_grammar(compiler: GrammarCompiler) -> None:
    def compile(text: str) -> None:
        compiler.compile(StructuredOutput(kind=StructureKind.REGEX, text=text))

    compile("a")
    assert compiler._workshop is not None
    process = compiler._workshop.trial._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    resumed = threading.Timer(1.0, os.kill, [process.pid, signal.SIGCONT])
    resumed.start()
    compile("b")
    resumed.join()
    os.kill(process.pid, signal.SIGSTOP)
    killed = threading.Timer(0.5, process.kill)
    killed.start()
    compile("c")  # by a process that was started anew
    killed.join()


def test_a_server_without_time_refuses_for_now_and_not_for_good(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    structured = StructuredOutput(kind=StructureKind.REGEX, text="a")
    with monkeypatch.context() as patched:
        patched.setattr("albireo_jax.text.grammar.sandbox._WALL_S", 0.0)
        with pytest.raises(OverloadedError, match="the server is busy"):
            compiler.compile(structured)
    assert compiler.compile(structured)


def test_a_limit_on_grammars_that_are_complex_at_the_same_time(
    trial: GrammarSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial._slow, "_most", 1)
    monkeypatch.setattr("albireo_jax.text.grammar.sandbox._SLOW_S", 1.0)
    with ThreadPoolExecutor(3) as pool:
        tries = [pool.submit(trial.check, _lark(_hard(i))) for i in range(3)]
        errors = [one.exception() for one in tries]
    busy = [error for error in errors if error is not None]
    assert len(busy) >= 1
    assert all(isinstance(error, OverloadedError) for error in busy)
    assert trial.check(_lark('start: "a"')) is None


def test_a_grammar_that_kills_its_process_leaves_the_next_alone(trial: GrammarSandbox) -> None:
    chain = "\n".join(f'r{i}: r{i + 1} "x"' for i in range(20_000))
    error = trial.check(_lark(f'start: r0\n{chain}\nr20000: "y"'))
    process = trial._process
    assert error is not None
    assert trial.check(_lark('start: "a"')) is None
    assert trial._process is process


def test_what_is_kept_is_bounded_by_count_and_bytes() -> None:
    kept = BoundedCache[str, int](3, max_bytes=10)
    for number, key in enumerate("abc"):
        kept.put(key, number, num_bytes=3)
    assert kept.get("a") == 0
    kept.put("d", 3, num_bytes=3)
    assert [kept.get(key) for key in "abcd"] == [0, None, 2, 3]
    kept.put("e", 4, num_bytes=5)
    assert [kept.get(key) for key in "acde"] == [None, None, 3, 4]
    kept.put("f", 5, num_bytes=11)
    assert len(kept) == 0
