"""Streamed text equals text decoded at once, with stop strings applied to it by a naive oracle."""

import codecs
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.text.detokenizer import Detokenizer, TextDelta
from albireo_jax.text.tokenizer import Tokenizer
from tests.labs.tokenizer_lab import TOKENIZERS

REPLACEMENT = "\ufffd"


class Case(NamedTuple):
    """A request's life: what was asked, what was sampled, and in which portions it came."""

    tokenizer: Tokenizer
    prompt: list[int]
    output: list[int]
    portions: list[int]
    params: SamplingParams
    reason: FinishReason


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    last = tokenizer.vocab_size - 1
    text_ids = st.sampled_from(["abc", "ab a b", "é你🙂", "🙂🙂", "\n\nab"]).map(tokenizer.encode)
    one = st.integers(0, last).map(lambda token: [token])
    few = st.integers(last - 12, last).map(lambda token: [token])
    output = [*chain.from_iterable(draw(st.lists(st.one_of(few, few, one, text_ids), max_size=10)))]
    text = tokenizer.decode(output)
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 5)).map(lambda s: text[s[0] : s[0] + s[1]])
    stops = draw(st.lists(st.one_of(spans, st.text("ab \né🙂", max_size=4)).filter(bool), max_size=3))
    params = SamplingParams(
        max_tokens=None,
        min_tokens=draw(st.one_of(st.just(0), st.integers(0, 6))),
        stop=tuple(stops),
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
    )
    return Case(
        tokenizer=tokenizer,
        prompt=[*chain.from_iterable(draw(st.lists(st.one_of(few, one, text_ids), max_size=3)))],
        output=output,
        portions=draw(st.lists(st.integers(0, 4), max_size=8)),
        params=params,
        reason=draw(st.sampled_from(FinishReason)),
    )


def _stable_text(case: Case, num_tokens: int, *, final: bool = False) -> str:
    """What `num_tokens` add to the prompt's text; half a character at the end counts only if `final`."""
    pieces = case.tokenizer.token_bytes(skip_special_tokens=case.params.skip_special_tokens)

    def text(ids: Sequence[int], *, final: bool) -> str:
        data = b"".join(pieces[token] for token in ids)
        if case.tokenizer.drops_first_space:
            data = data.removeprefix(b" ")
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)

    before = text(case.prompt, final=True)
    after = text([*case.prompt, *case.output[:num_tokens]], final=final)
    if after.startswith(before):
        return after[len(before) :]
    return after[len(before.removesuffix(REPLACEMENT)) :]  # the answer completes the prompt's last character


def _num_shown(case: Case) -> int:
    """Tokens whose text counts: all but the one that stopped the request."""
    stopped = case.reason is FinishReason.STOP and not case.params.include_stop_str_in_output
    return max(0, len(case.output) - stopped)


class Expected(NamedTuple):
    text: str
    stop: str | None


def _expected(case: Case) -> Expected:
    """The text decoded at once, cut at the first character that completes a stop string."""
    num_shown = _num_shown(case)
    text = _stable_text(case, num_shown, final=True)
    if num_shown > case.params.min_tokens:
        exempt = len(_stable_text(case, case.params.min_tokens)) if case.params.min_tokens else 0
        for end in range(exempt + 1, len(text) + 1):
            complete = [stop for stop in case.params.stop if text[:end].endswith(stop)]
            if complete:
                stop = max(complete, key=len)
                return Expected(
                    text[: end if case.params.include_stop_str_in_output else end - len(stop)], stop
                )
    return Expected(text, None)


def _portions(case: Case) -> list[list[int]]:
    """The output in portions; the last, which comes with the reason, holds the last token."""
    portions, rest = [], case.output
    for size in case.portions:
        size = min(size, max(0, len(rest) - 1))
        portions.append(rest[:size])
        rest = rest[size:]
    return [*portions, rest]


def _stream(case: Case) -> list[TextDelta]:
    detokenizer = Detokenizer(case.tokenizer, case.params, prompt_token_ids=case.prompt)
    *portions, last = _portions(case)
    deltas = [detokenizer.push(portion) for portion in portions]
    deltas.append(detokenizer.push(last, case.reason))
    assert detokenizer.finished
    assert detokenizer.push([1, 2]) == TextDelta("", (), None, None)
    return deltas


LAW = settings(deadline=None, derandomize=True, max_examples=500)
BYTES = TOKENIZERS["sentencepiece"]
SMILE = [token for token in BYTES.encode("😀") if token > 2][1:]


def _case(output: list[int], stop: tuple[str, ...] = (), **params: object) -> Case:
    sampling = SamplingParams(max_tokens=None, stop=stop, **params)  # type: ignore[arg-type]
    return Case(BYTES, [1], output, [1] * len(output), sampling, FinishReason.LENGTH)


@LAW
@given(case=cases())
@example(_case(SMILE))
@example(_case(SMILE[:-1]))
@example(_case([*SMILE[:3], *SMILE, 3 + 0xFF]))
@example(_case(SMILE, stop=("😀",)))
@example(_case(SMILE[:3], stop=(REPLACEMENT,)))
def test_deltas_add_up_to_the_text_decoded_at_once(case: Case) -> None:
    deltas = _stream(case)
    expected = _expected(case)
    assert "".join(delta.text for delta in deltas) == expected.text
    ended = [delta for delta in deltas if delta.finish_reason is not None]
    assert len(ended) == 1
    tokens = [token for delta in deltas for token in delta.token_ids]
    if expected.stop is None:
        assert (ended[0].finish_reason, ended[0].stop_reason) == (case.reason, None)
        assert tokens == case.output
    else:
        assert (ended[0].finish_reason, ended[0].stop_reason) == (FinishReason.STOP, expected.stop)
        assert tokens == case.output[: len(tokens)]


@LAW
@given(case=cases())
def test_text_waits_only_for_half_characters_and_stop_strings(case: Case) -> None:
    case = case._replace(reason=FinishReason.LENGTH)
    detokenizer = Detokenizer(case.tokenizer, case.params, prompt_token_ids=case.prompt)
    given_out = ""
    for count, token in enumerate(case.output, start=1):
        delta = detokenizer.push([token])
        given_out += delta.text
        text = _stable_text(case, count)
        if delta.finish_reason is not None:
            assert delta.stop_reason == _expected(case).stop
            end = len(given_out)
            if not case.params.include_stop_str_in_output:
                end += len(str(delta.stop_reason))
            assert len(_stable_text(case, count - 1)) < end <= len(text)  # the token that completes it
            return
        waiting = [
            size
            for size in range(1, len(text) + 1)
            for stop in case.params.stop
            if size < len(stop) and stop.startswith(text[len(text) - size :])
        ]
        assert given_out == text[: len(text) - max(waiting, default=0)]


@pytest.mark.parametrize(
    ("stop", "include", "text", "stop_reason"),
    [
        (("END",), False, "one two ", "END"),
        (("END",), True, "one two END", "END"),
        (("wo E", "END"), False, "one t", "wo E"),  # the first to be complete
        (("D", " END", "END"), False, "one two", " END"),  # the longest of those complete at once
        (("ENDE",), False, "one two END three", None),
        ((" three", "threes"), False, "one two END", " three"),
    ],
)
def test_stop_strings_span_tokens(
    stop: tuple[str, ...], include: bool, text: str, stop_reason: str | None
) -> None:
    tokenizer = TOKENIZERS["byte_level"]  # without merges: one token per byte
    params = SamplingParams(max_tokens=None, stop=stop, include_stop_str_in_output=include)
    detokenizer = Detokenizer(tokenizer, params)
    deltas = [detokenizer.push([token]) for token in tokenizer.encode("one two END three")]
    deltas.append(detokenizer.push([], FinishReason.ABORT))
    assert "".join(delta.text for delta in deltas) == text
    reasons = [(delta.finish_reason, delta.stop_reason) for delta in deltas if delta.finish_reason]
    assert reasons == [
        (FinishReason.STOP, stop_reason) if stop_reason is not None else (FinishReason.ABORT, None)
    ]


def test_a_stop_string_overrules_the_length_limit() -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte_level"], SamplingParams(stop=("b",)))
    delta = detokenizer.push(TOKENIZERS["byte_level"].encode("ab"), FinishReason.LENGTH)
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")


def test_stop_strings_wait_for_min_tokens() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    params = SamplingParams(stop=("aa",), min_tokens=3)
    detokenizer = Detokenizer(tokenizer, params)
    deltas = [detokenizer.push([token]) for token in tokenizer.encode("aaaa")]
    assert [delta.text for delta in deltas] == ["", "a", "a", ""]
    assert deltas[-1].stop_reason == "aa"  # of the third and fourth, not of the first two


@pytest.mark.parametrize(
    ("params", "text", "stop_reason"),
    [
        (SamplingParams(), "a", None),  # an end of sequence is no stop reason
        (SamplingParams(skip_special_tokens=False), "a", None),
        (SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), "a<|im_end|>", None),
        (SamplingParams(include_stop_str_in_output=True), "a", None),
    ],
)
def test_the_end_of_sequence_is_not_in_the_text(
    params: SamplingParams, text: str, stop_reason: int | None
) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    [end] = tokenizer.eos_token_ids
    delta = Detokenizer(tokenizer, params).push([*tokenizer.encode("a"), end], FinishReason.STOP)
    assert delta == TextDelta(text, (*tokenizer.encode("a"), end), FinishReason.STOP, stop_reason)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_of_the_caller_is_the_reason(include: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    first, second = tokenizer.encode("ab")
    params = SamplingParams(stop_token_ids=(second,), include_stop_str_in_output=include)
    delta = Detokenizer(tokenizer, params).push([first, second], FinishReason.STOP)
    assert delta == TextDelta("ab" if include else "a", (first, second), FinishReason.STOP, second)


@pytest.mark.parametrize(("ignore_eos", "named"), [(False, False), (True, True)])
def test_an_end_of_sequence_is_a_reason_only_where_it_is_nothing_else(ignore_eos: bool, named: bool) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    [end] = tokenizer.eos_token_ids
    params = SamplingParams(stop_token_ids=(end,), ignore_eos=ignore_eos)
    delta = Detokenizer(tokenizer, params).push([end], FinishReason.STOP)
    assert delta.stop_reason == (end if named else None)


def test_the_first_space_depends_on_the_prompt() -> None:
    space_a = BYTES.token_id("▁a")
    assert space_a is not None
    assert Detokenizer(BYTES, SamplingParams()).push([space_a]).text == "a"
    assert Detokenizer(BYTES, SamplingParams(), prompt_token_ids=[1]).push([space_a]).text == "a"
    shown = SamplingParams(skip_special_tokens=False)
    assert Detokenizer(BYTES, shown, prompt_token_ids=[1]).push([space_a]).text == " a"
    assert Detokenizer(BYTES, SamplingParams(), prompt_token_ids=[1, space_a]).push([space_a]).text == " a"


def test_half_a_character_is_given_out_when_nothing_more_comes() -> None:
    detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_token_ids=[1])
    assert detokenizer.push(SMILE[:3]).text == ""
    assert detokenizer.push([], FinishReason.LENGTH).text == REPLACEMENT


def test_the_answer_completes_a_character_of_the_prompt() -> None:
    prompt = [1, BYTES.token_id("a"), *SMILE[:2]]
    detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_token_ids=prompt)
    assert [detokenizer.push([token]).text for token in SMILE[2:]] == ["", "😀"]
    spoiled = Detokenizer(BYTES, SamplingParams(), prompt_token_ids=prompt)
    assert spoiled.push([BYTES.token_id("b")]).text == "b"  # the prompt's own text shows the U+FFFD


@pytest.mark.parametrize("model", ["stories260k", "babyllama105"])
def test_golden_answers_stream_to_their_text(data_dir: Path, model: str) -> None:
    tokenizer = Tokenizer.from_files(find_model(str(data_dir / "models" / model)))
    golden = json.loads((data_dir / "golden" / f"{model}.json").read_text())["greedy"]
    for case in golden:
        detokenizer = Detokenizer(tokenizer, SamplingParams(), prompt_token_ids=case["input_ids"])
        text = "".join(detokenizer.push([token]).text for token in case["output_ids"])
        whole = tokenizer.decode(case["input_ids"] + case["output_ids"])
        assert tokenizer.decode(case["input_ids"]) + text == whole
        assert text.removeprefix(" ") == case["text"]  # decoded alone there
