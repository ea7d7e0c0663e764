"""Tool calls are found wherever a text is cut, malformed ones are content, and no text takes long."""

import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.answers.call_reader import ArgumentsText, CallBegun, CallEnded, ContentText
from albireo_jax.text.answers.json_scanner import MAX_JSON_DEPTH, JsonScanner
from albireo_jax.text.answers.tool_calls import MAX_CALLS, ToolCallParser
from albireo_jax.text.chat_template import ChatTemplate

FORMATS = (ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.MISTRAL)
MARKERS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3_JSON: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
}
PIECES = (
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "</", "<|python_tag|>", "<|python", "[TOOL_CALLS]"),
    *("[TOOL", "[ARGS]", "[CALL_ID]", "abc123456", "weather", "{", "}", "[", "]", '"', ":", ",", ";", " "),
    *("\n", "\\", '{"name": "f", ', '"name"', '"arguments": {', '"parameters":', '{"a": [1, "}"]}', "null"),
    *("-0.5e3", "é", "Sure.", '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "parameters": {}}'),
    *('"id": "x"', '"\\u00e9"', '"\\ud800"', "\t", "\x00"),
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=16).map("".join)
CITY = {"city": 'Öl "x" \\ {[<tool_call>;', "n": [1, -2.5e3, True, None, {"deep": []}]}


class Found(NamedTuple):
    """The content and the calls that a parser found in a text; calls as (name, arguments)."""

    content: str
    calls: list[tuple[str, str]]


def _parse(format: ToolFormat, pieces: Sequence[str], *, max_calls: int = MAX_CALLS) -> Found:
    """The outcome, after checking that its events are in order."""
    ids = (f"id{i}" for i in itertools.count())
    parser = ToolCallParser(format, new_id=lambda: next(ids), max_calls=max_calls)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    content, names, arguments, num_ended = "", list[str](), list[str](), 0
    for event in events:
        match event:
            case ContentText(text):
                assert text
                assert num_ended == len(names)
                content += text
            case CallBegun(call, id, name):
                assert (call, id, num_ended) == (len(names), f"id{call}", call)
                names.append(name)
                arguments.append("")
            case ArgumentsText(call, text):
                assert text
                assert call == len(names) - 1 == num_ended
                arguments[call] += text
            case CallEnded(call, broken, cut_off):
                assert call == len(names) - 1 == num_ended
                assert len(arguments[call]) > 10**4 or bool(broken) == (not _is_object(arguments[call]))
                assert cut_off <= (broken != "")
                num_ended += 1
    assert num_ended == len(names)
    return Found(content, list(zip(names, arguments, strict=True)))


def _is_object(text: str) -> bool:
    scanner = JsonScanner()
    return text.startswith("{") and scanner.scan(text, 0) == len(text) and scanner.done


def _cut(text: str, cuts: Sequence[int]) -> list[str]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


@given(st.sampled_from((*FORMATS, ToolFormat.NONE)), TEXTS, st.lists(st.integers(0, 300), max_size=12))
def test_what_is_found_does_not_depend_on_where_the_text_is_cut(
    format: ToolFormat, text: str, cuts: list[int]
) -> None:
    whole = _parse(format, [text])
    assert _parse(format, _cut(text, cuts)) == whole
    assert _parse(format, list(text)) == whole
    assert _parse(format, list(text), max_calls=1) == _parse(format, [text], max_calls=1)


@given(st.sampled_from(FORMATS), TEXTS)
def test_text_without_a_marker_comes_back_unchanged(format: ToolFormat, text: str) -> None:
    found = _parse(format, [text])
    begins_json = format is ToolFormat.LLAMA3_JSON and re.search(r"^[ \t\r]*[{\[`]", text, re.MULTILINE)
    if MARKERS[format] not in text and not begins_json:
        assert found == Found(text, [])
    assert _parse(ToolFormat.NONE, [text]) == Found(text, [])


@given(st.sampled_from(FORMATS), TEXTS)
def test_nothing_is_lost(format: ToolFormat, text: str) -> None:
    found = _parse(format, [text])
    if not found.calls:
        assert found.content == text
    rest = iter(text)  # content is made of the text's characters, in their order
    assert all(character in rest for character in found.content)


@given(st.sampled_from(FORMATS), TEXTS)
def test_arguments_are_always_the_beginning_of_an_object(format: ToolFormat, text: str) -> None:
    for _, arguments in _parse(format, [text]).calls:
        assert arguments.startswith("{")
        scanner = JsonScanner()
        assert scanner.scan(arguments, 0) == len(arguments)
        assert not scanner.failed


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3)
CALLS = st.lists(
    st.tuples(st.from_regex(r"[A-Za-z_][\w.-]{0,8}", fullmatch=True), ARGUMENTS), min_size=1, max_size=3
)


def _written(format: ToolFormat, calls: Sequence[tuple[str, str]], *, names_first: bool = False) -> str:
    """Calls as models are taught to write them."""
    key = "parameters" if format is ToolFormat.LLAMA3_JSON else "arguments"
    objects = [f'{{"name": {json.dumps(name)}, "{key}": {arguments}}}' for name, arguments in calls]
    if format is ToolFormat.HERMES:
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in objects)
    if format is ToolFormat.LLAMA3_JSON:
        return "; ".join(objects)
    if names_first:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    return f"[TOOL_CALLS][{', '.join(objects)}]"


@given(st.sampled_from(FORMATS), CALLS, st.booleans(), st.booleans())
def test_calls_come_back_as_they_were_written(
    format: ToolFormat, calls: list[tuple[str, dict[str, object]]], names_first: bool, ascii: bool
) -> None:
    texts = [(name, json.dumps(arguments, ensure_ascii=ascii)) for name, arguments in calls]
    assert _parse(format, [_written(format, texts, names_first=names_first)]) == Found("", texts)


@pytest.mark.parametrize("format", FORMATS)
def test_arguments_are_passed_on_as_they_come(format: ToolFormat) -> None:
    text = _written(format, [("f", json.dumps(CITY))])
    parser = ToolCallParser(format, new_id=lambda: "id")
    seen = ""
    for character in text:
        seen += character
        for event in parser.push(character):
            if isinstance(event, ArgumentsText):
                assert seen.endswith(event.text)
    assert isinstance(parser.finish(), list)


ONE = [("f", '{"x": 1}')]


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        # Content around calls; the white space beside a call is not content.
        (
            "hermes",
            'Let me see.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n',
            "Let me see.",
            ONE,
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\nDone', "\nDone", ONE),
        ("llama3_json", ' <|python_tag|> {"name": "f", "parameters": {"x": 1}} ', "", ONE),
        ("llama3_json", 'Now <|python_tag|>{"name": "f", "parameters": {"x": 1}} ;', "Now", ONE),
        ("mistral", 'I [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}] ', "I", ONE),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}', "", ONE),
        ("mistral", '[TOOL_CALLS]f{"x": 1}', "", ONE),
        # Members in another order, and others beside them.
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", ONE),
        ("llama3_json", '{"type": "function", "name": "f", "parameters": {"x": 1}}', "", ONE),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]', "", ONE),
        # What small models forget.
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "", ONE),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', "", ONE),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}', "", ONE),
        # Cut off by the length limit.
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "lo', "", [("f", '{"x": "lo')]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": [', "", [("f", '{"x": [')]),
        ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
        # Broken after it began: it stays unfinished, and the rest is content.
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"x": oh</tool_call>',
            "oh</tool_call>",
            [("f", '{"x": ')],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}, oh}', ", oh}", ONE),
        # No calls.
        ("hermes", "<tool_call>\nf(1)\n</tool_call>", "<tool_call>\nf(1)\n</tool_call>", []),
        (
            "hermes",
            '<tool_call>{"name": "", "arguments": {}}',
            '<tool_call>{"name": "", "arguments": {}}',
            [],
        ),
        (
            "hermes",
            '<tool_call><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
            "<tool_call>",
            ONE,
        ),
        ("llama3_json", '{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', []),
        (
            "llama3_json",
            'So: {"name": "f", "parameters": {"x": 1}}',
            'So: {"name": "f", "parameters": {"x": 1}}',
            [],
        ),
        ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("llama3_json", '{"name": "f", "parameters": {"x": 1}}; and', "; and", ONE),
        ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
        ("mistral", "[TOOL_CALLS]none", "[TOOL_CALLS]none", []),
    ],
)
def test_examples(format: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert _parse(ToolFormat(format), [text]) == Found(content, calls)


def test_only_so_many_calls_are_looked_for() -> None:
    text = _written(ToolFormat.HERMES, ONE * (MAX_CALLS + 1))
    found = _parse(ToolFormat.HERMES, [text])
    assert found.calls == ONE * MAX_CALLS
    assert found.content == "\n" + _written(ToolFormat.HERMES, ONE)


@given(TEXTS | JSON_VALUES.map(json.dumps) | st.text())
def test_the_scanner_agrees_with_the_json_module(text: str) -> None:
    """Of what follows a bracket: a value at the top may be a number, whose end cannot be seen."""
    scanner = JsonScanner()
    end = scanner.scan("[" + text, 0)
    try:
        value, read = json.JSONDecoder(parse_constant=_refuse).raw_decode("[" + text)
    except ValueError:
        assert not scanner.done
    else:
        assert (scanner.done, end) == (True, read), value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_depth_is_limited() -> None:
    for depth, failed in ((MAX_JSON_DEPTH, False), (MAX_JSON_DEPTH + 1, True)):
        scanner = JsonScanner()
        scanner.scan('{"a":' * (depth - 1) + "[" + "]" + "}" * (depth - 1), 0)
        assert (scanner.failed, scanner.done) == (failed, not failed)


BEGIN = {
    ToolFormat.HERMES: '<tool_call>{"name":"f","arguments":{"a":',
    ToolFormat.LLAMA3_JSON: '{"name":"f","parameters":{"a":',
    ToolFormat.MISTRAL: '[TOOL_CALLS][{"name":"f","arguments":{"a":',
}
HOSTILE = [
    *(
        "<",
        "<tool_call>",
        "<tool_call",
        "<tool_call>{",
        '<tool_call>{"',
        '<tool_call>{"name":"f","arguments":{}}</tool_call>',
    ),
    *(
        "<|",
        "<|python_tag|>",
        "<|python_tag|>{",
        '{"name":"f","parameters":{}};',
        "{",
        "[",
        '"',
        '"\\',
        " ",
        "\n<",
    ),
    *(
        "[TOOL_CALLS]",
        "[TOOL_CALLS][",
        "[TOOL_CALLS]f[ARGS]{}",
        "[TOOL_CALLS]f",
        "[ARGS]",
        '{"a":',
        "é\n",
        "0",
        "1,",
    ),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("no_collector")
def test_a_hostile_megabyte_takes_less_than_a_second(format: ToolFormat) -> None:
    size = 10**6
    texts = [(unit * size)[:size] for unit in HOSTILE]
    texts += [
        (BEGIN[format] + opening + unit * size)[:size]
        for opening, unit in (
            ("[", "1,"),
            ("[", '"",'),
            ("[", "[],"),
            ('"', "\\n"),
            ('"', "x"),
            ("", " "),
            ("0.", "1"),
        )
    ]
    texts += [BEGIN[format][:-5] + " " * size, BEGIN[format].replace('"f"', '"' + "x" * size)]
    for text in texts:
        few = text[: size // 50]
        pieces = [few[start : start + 4] for start in range(0, len(few), 4)]
        for limit_s, parts in ((1.0, [text]), (0.8, pieces)):
            taken_s = (_seconds(format, parts) for _ in range(3))  # again where the machine was busy
            assert any(seconds < limit_s for seconds in taken_s), (format, text[:60])


def _seconds(format: ToolFormat, pieces: Sequence[str]) -> float:
    started_s = time.thread_time()
    _parse(format, pieces)
    return time.thread_time() - started_s


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", ToolFormat.HERMES),
        ("Qwen-Qwen3-0.6B", ToolFormat.HERMES),
        ("Qwen-QwQ-32B", ToolFormat.HERMES),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", ToolFormat.HERMES),
        ("meta-llama-Llama-3.1-8B-Instruct", ToolFormat.LLAMA3_JSON),
        ("meta-llama-Llama-3.2-3B-Instruct", ToolFormat.LLAMA3_JSON),
        ("mistralai-Mistral-Nemo-Instruct-2407", ToolFormat.MISTRAL),
        ("Mistral-Small-3.2-24B-Instruct-2506", ToolFormat.MISTRAL),
    ],
)
def test_calls_are_read_as_real_templates_write_them(data_dir: Path, name: str, format: ToolFormat) -> None:
    """The last turn of a rendered conversation, up to the end-of-turn token, is what a model would say."""
    source = (data_dir / "templates" / "llama_cpp" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate({"default": source}, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    user = {"role": "user", "content": "Weather?"}
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps(CITY)},
    }
    assistant = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}]
    before, _, _ = template.render([user], tools=tools).partition("<think>")
    after = template.render([user, assistant], tools=tools, add_generation_prompt=False)
    common = next(i for i, (a, b) in enumerate(zip(before + "\0", after, strict=False)) if a != b)
    answer = after[common:].removesuffix("\n")
    for end in ("</s>", "<|im_end|>", "<|eot_id|>"):
        answer = answer.removesuffix(end)
    found = _parse(format, [answer.removeprefix("<think>\n\n</think>\n\n")])
    assert found.content == ""
    ((called, arguments),) = found.calls
    assert (called, json.loads(arguments)) == ("weather", CITY)
