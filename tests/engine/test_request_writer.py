"""Requests are written once for all prompts, and words are counted as the caller counts them."""

import time

import numpy as np
import pytest

from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.logit_rules import MAX_BAD_WORDS, MAX_WORDS
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.constraint_compiler import ConstraintCompiler, NoCompiler
from albireo_jax.engine.request_writer import RequestWriter
from tests.labs.engine_lab import LIMITS, lab, tiny_tokenizer


def _writer() -> RequestWriter:
    tokenizer = tiny_tokenizer()
    return RequestWriter(
        tokenizer,
        LIMITS,
        eos_token_ids=tokenizer.eos_token_ids,
        clock=time.perf_counter,
        compile_first=ConstraintCompiler(NoCompiler()).first_mask,
    )


def test_as_many_words_as_the_limit_says_can_be_refused_and_no_more() -> None:
    words = [f"w{i}" for i in range(MAX_WORDS + 1)]
    params = SamplingParams(bad_words=tuple(words[:-1] * 2))
    (request,) = _writer().write((1, 2), params)
    assert request.rules is not None
    assert len(request.rules.bad_words) == MAX_BAD_WORDS == 2 * len(words[:-1])
    with pytest.raises(ValueError, match=r"bad_words has 33 words, the limit is 32"):
        SamplingParams(bad_words=tuple(words))
    with pytest.raises(ValueError, match=r"bad_words has 100000 words, the limit is 32"):
        SamplingParams(bad_words=tuple(f"word{i}" for i in range(100_000)))


@pytest.mark.parametrize("word", ["x" * 9, "x" * 1_000_000])
def test_a_word_of_too_many_tokens_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"bad_words .* the limit is 8") as caught:
        _writer().write((1, 2), SamplingParams(bad_words=(word,)))
    assert len(str(caught.value)) < 300


def test_prompts_and_samples_share_what_is_the_same() -> None:
    params = SamplingParams(n=3, seed=5, allowed_token_ids=tuple(range(90)), bad_words=("ab",))
    with lab() as engine:
        choices = engine.frontend.write(["hello", (1, 2, 3), "hello"], params)
    requests = [choice.request for choice in choices]
    assert len({id(request.rules) for request in requests}) == 1
    assert len({id(request.prompt_token_ids) for request in requests}) == 3
    assert [request.sampling.seed for request in requests] == [5, 6, 7] * 3
    alone = _writer().write((1, 2, 3), params)
    for written, own in zip(requests[3:6], alone, strict=True):
        assert np.array_equal(written.prompt_token_ids, own.prompt_token_ids)
        assert (written.rules, written.stop_ids) == (own.rules, own.stop_ids)


def test_ids_that_cannot_fit_are_refused_unread() -> None:
    with lab() as engine, pytest.raises(ContextLengthError, match="the prompt has 3000000 tokens"):
        engine.frontend.write([["no id"] * 3_000_000], SamplingParams())  # type: ignore[list-item]
