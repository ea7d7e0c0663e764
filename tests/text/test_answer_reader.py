"""Answers come apart into reasoning, content and calls however they are cut."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.answers.answer_reader import (
    Answer,
    AnswerReader,
    collect_answer,
    fitting_call_id,
    new_call_id,
)
from albireo_jax.text.answers.reasoning import Thinking

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", CALL, "<tool_call>", "Hm. ", "\n", '{"x', "</tool_call>"])
).map("".join)


def _without_ids(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    return answer.reasoning, answer.content, [(call.name, call.arguments) for call in answer.calls]


def _read(pieces: Sequence[str], thinking: Thinking, *, parallel: bool) -> Answer:
    reader = AnswerReader(ToolFormat.HERMES, thinking, parallel=parallel)
    events = [event for piece in pieces for event in reader.push(piece)]
    return collect_answer(events + reader.finish())


@given(TEXTS, st.sampled_from(Thinking), st.booleans(), st.lists(st.integers(0, 200), max_size=8))
def test_every_cut_gives_the_same_answer(
    text: str, thinking: Thinking, parallel: bool, cuts: list[int]
) -> None:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]
    whole = AnswerReader(ToolFormat.HERMES, thinking, parallel=parallel).read(text)
    assert _without_ids(_read(pieces, thinking, parallel=parallel)) == _without_ids(whole)
    assert len({call.id for call in whole.calls}) == len(whole.calls)
    assert parallel or len(whole.calls) <= 1


def test_calls_are_only_looked_for_in_the_answer() -> None:
    text = f"<think>{CALL}</think>Well.{CALL}{CALL}"
    one = ("f", '{"x": 1}')
    for parallel, calls in ((True, [one, one]), (False, [one])):
        answer = _read([text], Thinking.POSSIBLE, parallel=parallel)
        assert _without_ids(answer) == (CALL, "Well.", calls)


@pytest.mark.parametrize("id", ["call_0123456789abcdef", "1", "", "abcdefghi", "é" * 20])
def test_mistrals_ids_are_nine_letters_and_digits(id: str) -> None:
    fitting = fitting_call_id(ToolFormat.MISTRAL, id)
    assert len(fitting) == 9
    assert fitting.isalnum()
    assert fitting_call_id(ToolFormat.MISTRAL, fitting) == fitting
    assert fitting_call_id(ToolFormat.HERMES, id) == id
    new = new_call_id(ToolFormat.MISTRAL)
    assert fitting_call_id(ToolFormat.MISTRAL, new) == new
