"""Calls are read however models write them, what breaks is content, and no cut of the text changes that."""

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.answers.answer_reader import Answer, AnswerReader, collect_answer
from albireo_jax.text.answers.json_repair import JsonRepair
from albireo_jax.text.answers.json_scanner import JsonScanner
from albireo_jax.text.answers.reasoning import Thinking

HERMES, LLAMA, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.MISTRAL
A = '{"name": "a", "arguments": {"x": 1}}'
B = '{"name": "b", "arguments": {}}'
P = A.replace("arguments", "parameters")
CALL_A, CALL_B = ("a", '{"x": 1}'), ("b", "{}")
TAG = "<tool_call>\n%s\n</tool_call>"

SPELLINGS = [
    # Arguments that are missing, null, empty, or JSON text, under either name.
    *((HERMES, TAG % f'{{"name": "b"{rest}}}', "", [CALL_B]) for rest in ("", ", ", ', "id": "call_1"')),
    *(
        (HERMES, TAG % f'{{"name": "b", "arguments": {none}}}', "", [CALL_B])
        for none in ("null", '""', '" "', '"{}"', '"null"', "[]", "None")
    ),
    (HERMES, TAG % r'{"name": "a", "arguments": "{\"x\": 1}"}', "", [CALL_A]),
    (HERMES, TAG % r'{"arguments": "{\"x\": 1}", "name": "a"}', "", [CALL_A]),
    (HERMES, TAG % P, "", [CALL_A]),
    (LLAMA, A, "", [CALL_A]),
    (LLAMA, '{"name": "b", "parameters": null}', "", [CALL_B]),
    (LLAMA, r'{"name": "a", "parameters": "{\"x\": 1}"}', "", [CALL_A]),
    (MISTRAL, "[TOOL_CALLS]b[ARGS]null", "", [CALL_B]),
    # OpenAI's nesting, and names under another key.
    (HERMES, TAG % f'{{"type": "function", "function": {A}}}', "", [CALL_A]),
    (LLAMA, f'{{"id": "call_1", "type": "function", "function": {P}}}', "", [CALL_A]),
    (LLAMA, '{"type": "function", "name": "b"}', "", [CALL_B]),
    (HERMES, TAG % '{"function": "a", "arguments": {"x": 1}}', "", [CALL_A]),
    # Several calls in one place.
    *((HERMES, TAG % f"{A}{apart}{B}", "", [CALL_A, CALL_B]) for apart in ("", "\n", ", ", "; ", "\n\n")),
    (HERMES, TAG % f"[{A}, {B}]", "", [CALL_A, CALL_B]),
    *((LLAMA, f"{P}{apart}{B}", "", [CALL_A, CALL_B]) for apart in ("", "\n", ", ", "; ", "\n\n")),
    (LLAMA, f"<|python_tag|>{P}; {B};", "", [CALL_A, CALL_B]),
    (LLAMA, f"[{P}, {B}]", "", [CALL_A, CALL_B]),
    (LLAMA, f"<|python_tag|>[{P}]", "", [CALL_A]),
    (MISTRAL, f"[TOOL_CALLS]{A}", "", [CALL_A]),
    (MISTRAL, f"[TOOL_CALLS] [ {A} , {B} ] ", "", [CALL_A, CALL_B]),
    (MISTRAL, f"[TOOL_CALLS][{A}][/TOOL_CALLS]", "", [CALL_A]),
    (MISTRAL, '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', "", [CALL_A, CALL_B]),
    (MISTRAL, '[TOOL_CALLS]a[ARGS]{"x": 1}, b[ARGS]{}', "", [CALL_A, CALL_B]),
    (MISTRAL, '[TOOL_CALLS]a{"x": 1}[TOOL_CALLS]b{}', "", [CALL_A, CALL_B]),
    (MISTRAL, '[TOOL_CALLS]a [ARGS] {"x": 1} Done.', " Done.", [CALL_A]),
    # Brackets and tags too many or too few.
    *((HERMES, TAG % (A + extra), "", [CALL_A]) for extra in ("}", "}}", "]", "\n}")),
    *((HERMES, f"<tool_call>{A}{end}", "", [CALL_A]) for end in ("", "\n", "\n<tool_call>", "}")),
    (HERMES, TAG % A + "</tool_call>", "", [CALL_A]),
    (HERMES, f"<tool_call>{A}\n" + TAG % B, "", [CALL_A, CALL_B]),
    (HERMES, f"<tool_call>{A[:-1]}\n" + TAG % B, "", [CALL_A, CALL_B]),
    (HERMES, f"<tool_call>{A}\nThat is it.</tool_call>", "\nThat is it.", [CALL_A]),
    (LLAMA, P + "}", "", [CALL_A]),
    (MISTRAL, f"[TOOL_CALLS][{A}]]", "", [CALL_A]),
    # Fences, and a call after a sentence.
    (HERMES, TAG % f"```json\n{A}\n```", "", [CALL_A]),
    (LLAMA, f"```json\n{P}\n```", "", [CALL_A]),
    (LLAMA, f"Here:\n```\n{P}\n```\nDone.", "Here:\nDone.", [CALL_A]),
    (LLAMA, f"I look it up.\n{P}\nMore.", "I look it up.\nMore.", [CALL_A]),
    (LLAMA, f'{{"city": "Rome"}}\n{P}', '{"city": "Rome"}', [CALL_A]),
    (MISTRAL, f"[TOOL_CALLS]\n```json\n[{A}]\n```", "", [CALL_A]),
    # Python's spelling, raw control characters, escapes that JSON has not, trailing commas.
    (HERMES, TAG % "{'name': 'a', 'arguments': {'x': 1}}", "", [CALL_A]),
    (
        HERMES,
        TAG % '{"name": "a", "arguments": {"x": True, "y": [None, False,],},}',
        "",
        [("a", '{"x": true, "y": [null, false]}')],
    ),
    (HERMES, TAG % '{"name": "a", "arguments": {"x": "1\n\t2\x00"}}', "", [("a", r'{"x": "1\n\t2\u0000"}')]),
    (HERMES, TAG % r'{"name": "a", "arguments": {"x": "\d\'\u12"}}', "", [("a", '{"x": "\\\\d\'\\\\u12"}')]),
    (MISTRAL, "[TOOL_CALLS]a[ARGS]{'x': 'a \"b\" \\'c\\''}", "", [("a", '{"x": "a \\"b\\" \'c\'"}')]),
    # Names in other alphabets.
    (HERMES, TAG % '{"name": "öl", "arguments": {"ö": "ü"}}', "", [("öl", '{"ö": "ü"}')]),
    (MISTRAL, "[TOOL_CALLS]天気[ARGS]{}", "", [("天気", "{}")]),
]
CONTENT = [
    (HERMES, "Write <tool_call> and </tool_call> around calls."),
    (HERMES, "Use `<tool_call>{...}</tool_call>`."),
    (HERMES, 'So: <tool_call>{"name": "a", "arguments": {...}}</tool_call>.'),
    (HERMES, A),
    *(
        (HERMES, TAG % f'{{"name": "a", "arguments": {wrong}}}')
        for wrong in ("3", "[1]", '"noon"', '"[1]"', "true")
    ),
    *(
        (HERMES, TAG % f'{{"name": "a", "arguments": {{{wrong}}}}}')
        for wrong in ('"x": oh', '"x": "He said "hi""', "x: 1", '"x": NaN', '"x": 01', '"x": }')
    ),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"x": 1</tool_call>'),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"x": "lo'),
    (LLAMA, '{"name": "Ada"}'),
    (LLAMA, '```json\n{"city": "Rome"}\n```'),
    (LLAMA, "See\n[this](link)\n`{}`\n{}\n[1, 2]"),
    (LLAMA, '{"name": "a", "parameters": {"x": oh}}'),
    (MISTRAL, "Say [TOOL_CALLS] first."),
    (MISTRAL, '[TOOL_CALLS]a[ARGS]{"x": oh}'),
]
CUTS = st.lists(st.integers(0, 300), max_size=12)


def _pieces(text: str, cuts: Sequence[int]) -> list[str]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


def _seen(answer: Answer) -> tuple[str, list[tuple[str, str]]]:
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


def _read(format: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    return _seen(AnswerReader(format, Thinking.OVER).read(text))


@pytest.mark.parametrize(("format", "text", "content", "calls"), SPELLINGS)
def test_calls_are_read(format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert _read(format, text) == (content, calls)
    if not content:
        assert _read(format, f"First I think.\n{text}") == ("First I think.", calls)


@pytest.mark.parametrize(("format", "text"), CONTENT)
def test_all_else_is_content(format: ToolFormat, text: str) -> None:
    assert _read(format, text) == (text, [])


ALL = [(format, text) for format, text, _, _ in SPELLINGS] + CONTENT


@given(st.sampled_from(ALL), st.sampled_from(ALL), CUTS, st.booleans())
def test_a_stream_says_what_the_whole_says(
    one: tuple[ToolFormat, str], other: tuple[ToolFormat, str], cuts: list[int], parallel: bool
) -> None:
    text = f"{one[1]}\n{other[1]}"
    for format in (one[0], other[0]):
        whole = _seen(AnswerReader(format, Thinking.OVER, parallel=parallel).read(text))
        for pieces in (_pieces(text, cuts), list(text)):
            reader = AnswerReader(format, Thinking.OVER, parallel=parallel)
            events = [event for piece in pieces for event in reader.push(piece)]
            assert _seen(collect_answer(events + reader.finish())) == whole
        for _, arguments in whole[1]:
            assert isinstance(json.loads(arguments), dict)


def test_an_answer_that_is_cut_off_may_end_with_part_of_a_call() -> None:
    text = '<tool_call>{"name": "a", "arguments": {"x": "lo'
    cut_off = AnswerReader(HERMES, Thinking.OVER).read(text, cut_off=True)
    assert _seen(cut_off) == ("", [("a", '{"x": "lo')])
    broken = TAG % '{"name": "a", "arguments": {"x": oh}}'
    assert _seen(AnswerReader(HERMES, Thinking.OVER).read(broken, cut_off=True)) == (broken, [])


def test_a_call_that_breaks_is_not_the_one_call_of_an_answer() -> None:
    text = TAG % '{"name": "a", "arguments": {"x": oh}}' + TAG % B + TAG % A
    reader = AnswerReader(HERMES, Thinking.OVER, parallel=False)
    assert _seen(reader.read(text))[1] == [CALL_B]


JSON_PIECES = (
    *(
        '{"a": ',
        "{'b': ",
        "[",
        "]",
        "}",
        ",",
        ", ",
        "True",
        "False",
        "None",
        "null",
        "1",
        "-2.5e3",
        '"x"',
        "'y'",
    ),
    *('"\n"', '"\\d"', "'\"'", '"\\u00e9"', '"\\u0', '"', "'", "\\", "\t", " ", ":", "é", "\x01"),
)


@given(st.lists(st.sampled_from(JSON_PIECES), max_size=14).map("".join), CUTS)
@example('"x","x"', [5])  # right behind a comma
@example("True,[", [6])
def test_the_mender_writes_json_however_it_is_cut(text: str, cuts: list[int]) -> None:
    text = "[" + text
    whole = _mend([text])
    assert _mend(_pieces(text, cuts)) == whole
    assert _mend(list(text)) == whole
    written, done = whole
    scanner = JsonScanner()
    assert scanner.scan(written, 0) == len(written)
    assert not scanner.failed
    if done:
        json.loads(written)
    strict = JsonScanner()
    end = strict.scan(text, 0)
    if strict.done:
        assert (written, done) == (text[:end], True)


def _mend(pieces: Sequence[str]) -> tuple[str, bool]:
    mender = JsonRepair()
    written, rest = "", ""
    for piece in pieces:
        rest += piece
        rest = rest[mender.mend(rest, 0) :]
        written += mender.take()
        if mender.done or mender.failed:
            break
    return written, mender.done
