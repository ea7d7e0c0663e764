"""Tools and reasoning as OpenAI's client sees them, whole and streamed, of answers that are known."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat
from tests.labs.script_lab import (
    HELLO,
    TIME,
    WEATHER,
    asked_for,
    chat_template,
    script_client,
    script_tokenizer,
)

ARGUMENTS = ('{"city": "Rome"}', "{}")
ANSWERS = {
    ToolFormat.HERMES: (
        "Well.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    ),
    ToolFormat.LLAMA3_JSON: (
        'Well.<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; '
        '{"name": "time", "parameters": {}}'
    ),
    ToolFormat.MISTRAL: (
        'Well.[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, '
        '{"name": "time", "arguments": {}}]'
    ),
}


def _whole(client: openai.OpenAI, **options: Any) -> tuple[dict[str, Any], str]:
    """The message and the end of an answer, and the same from a stream of it."""
    options = {"model": "tiny", "messages": HELLO, "seed": 0, **options}
    (choice,) = client.chat.completions.create(**options).choices
    message = choice.message.model_dump(exclude_none=True)
    streamed, end = _streamed(client.chat.completions.create(stream=True, **options))
    for calls in (message.get("tool_calls", []), streamed.get("tool_calls", [])):
        ids = [call.pop("id") for call in calls]
        assert len({*ids}) == len(ids)
        assert all(ids)
    assert (streamed, end) == (message, choice.finish_reason)
    return message, end


def _streamed(stream: openai.Stream[Any]) -> tuple[dict[str, Any], str]:
    """The message that a stream's deltas add up to, as clients put it together."""
    message: dict[str, Any] = {}
    end = ""
    for chunk in stream:
        (choice,) = chunk.choices
        end = choice.finish_reason
        for name, value in choice.delta.model_dump(exclude_none=True).items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            for delta in value:
                calls = message.setdefault("tool_calls", [])
                if delta["index"] == len(calls):
                    assert list(delta) == ["index", "id", "function", "type"]
                    calls.append({"id": delta["id"], "function": delta["function"], "type": "function"})
                else:
                    assert (delta["index"], list(delta["function"])) == (len(calls) - 1, ["arguments"])
                    calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    if not message["content"] and len(message) > 2:
        del message["content"]  # null in a whole answer
    return message, end


@pytest.mark.parametrize("format", [ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.MISTRAL])
def test_calls_are_told_from_content(format: ToolFormat) -> None:
    with script_client(chat_template(format), ANSWERS[format]) as client:
        message, end = _whole(client, tools=[WEATHER, TIME])
        assert (message["role"], message["content"], end) == ("assistant", "Well.", "tool_calls")
        called = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
        assert called == list(zip(("weather", "time"), ARGUMENTS, strict=True))
        one, _ = _whole(client, tools=[WEATHER, TIME], parallel_tool_calls=False)
        assert len(one["tool_calls"]) == 1
        # Who brings no tools, or wants none called, gets text; special tokens are hidden as ever.
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            message, end = _whole(client, **options)
            text = ANSWERS[format].replace("<|python_tag|>", "").replace("[TOOL_CALLS]", "")
            assert (message["content"], end) == (text, "stop")
            assert "tool_calls" not in message


def test_arguments_are_streamed_as_they_come() -> None:
    with script_client(chat_template(ToolFormat.HERMES), ANSWERS[ToolFormat.HERMES]) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], seed=0, stream=True
        )
        calls = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
        first = [call.function.arguments for call in calls if call.index == 0]
        assert (first[0], "".join(first)) == ("", ARGUMENTS[0])
        assert len(first) > 2


def test_a_call_that_is_cut_off_ends_by_length() -> None:
    answer = '<tool_call>{"name": "weather", "arguments": {"city": "Ro'
    with script_client(chat_template(ToolFormat.HERMES), answer) as client:
        message, end = _whole(client, tools=[WEATHER], max_tokens=len(answer))
        assert (message["tool_calls"][0]["function"]["arguments"], end) == ('{"city": "Ro', "length")


@pytest.mark.parametrize(
    ("arguments", "mended"),
    [
        ('{"city": "New\nYork"}', '{"city": "New\\nYork"}'),
        ('{"city": True,}', '{"city": true}'),
        ('{"city": oh}', None),
        ('{"city": "He said "hi""}', None),
        ('{"city": "STOP"}', None),
    ],
)
def test_a_call_that_breaks_is_none(arguments: str, mended: str | None) -> None:
    """Whole it is content; a stream has announced it, and does not end for calls."""
    answer = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
    with script_client(chat_template(ToolFormat.HERMES), answer) as client:
        options = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "seed": 0, "stop": ["STOP"]}
        (choice,) = client.chat.completions.create(**options).choices
        streamed, end = _streamed(client.chat.completions.create(stream=True, **options))
    if mended is None:
        assert (choice.message.content, choice.finish_reason) == (answer.partition("STOP")[0], "stop")
        assert choice.message.tool_calls is None
        assert end == "stop"
        assert len(streamed["tool_calls"]) == 1
    else:
        assert choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.arguments == mended
        assert streamed["tool_calls"][0]["function"]["arguments"] == mended
        assert choice.finish_reason == end == "tool_calls"


def test_what_is_no_call_is_content() -> None:
    for answer in ("No.", " <tool_call>weather</tool_call> ", "<tool_call>"):
        with script_client(chat_template(ToolFormat.HERMES), answer) as client:
            message, end = _whole(client, tools=[WEATHER])
            assert (message, end) == ({"role": "assistant", "content": answer}, "stop")


def test_calls_and_results_reach_thechat_template() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": 2}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    template = chat_template(ToolFormat.HERMES)
    asked = asked_for(template, messages=messages, tools=[TIME])
    prompt = script_tokenizer(template).decode(asked.prompt_ids)
    tools = [
        {
            "type": "function",
            "function": {**TIME["function"], "parameters": {"type": "object", "properties": {}}},
        }
    ]
    assistant = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "time", "arguments": {"zone": 2}}}],
        "reasoning_content": "Hm.",
    }
    parsed, end = json.JSONDecoder().raw_decode(prompt)
    assert parsed == tools
    rest = prompt[end:]
    for expected in (HELLO[0], assistant, {**messages[2]}):
        parsed, end = json.JSONDecoder().raw_decode(rest)
        assert parsed == expected
        rest = rest[end:]
    asked = asked_for(chat_template(ToolFormat.MISTRAL), messages=messages, tools=[TIME])
    prompt = script_tokenizer(template).decode(asked.prompt_ids)
    assert prompt.count('"0000call1"') == 2  # its templates insist on nine letters and digits


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct",
        "Qwen-Qwen3-0.6B",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
        "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct",
        "mistralai-Mistral-Nemo-Instruct-2407",
        "Mistral-Small-3.2-24B-Instruct-2506",
    ],
)
def test_real_templates_take_calls_and_results(data_dir: Path, name: str) -> None:
    template = (data_dir / "templates" / "llama_cpp" / f"{name}.jinja").read_text(encoding="utf-8")
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": 2}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    prompt = script_tokenizer(template).decode(
        asked_for(template, messages=messages, tools=[TIME]).prompt_ids, skip_special_tokens=False
    )
    assert prompt.index("Weather?") < prompt.index('{"zone": 2}') < prompt.index("It is noon.")


def test_the_parser_can_be_chosen() -> None:
    answer = ANSWERS[ToolFormat.HERMES]
    with script_client(chat_template(), answer, tool_call_parser=ToolFormat.HERMES) as client:
        message, _ = _whole(client, tools=[WEATHER])
        assert len(message["tool_calls"]) == 2
    with (
        script_client(chat_template(ToolFormat.HERMES), answer, tool_call_parser=ToolFormat.NONE) as client,
        pytest.raises(openai.BadRequestError, match="tools are not supported"),
    ):
        _whole(client, tools=[WEATHER])


def test_reasoning_is_told_from_the_answer() -> None:
    thought = "<think>\nHm, 2 + 2.\n</think>\n\nFour."
    expected = {"role": "assistant", "content": "Four."} | dict.fromkeys(
        ("reasoning_content", "reasoning"), "Hm, 2 + 2."
    )
    with script_client(
        chat_template(thinks=True), thought, "Four.", thought.partition("<think>")[2]
    ) as client:
        assert _whole(client) == (expected, "stop")
        assert _whole(client, seed=1) == ({"role": "assistant", "content": "Four."}, "stop")
        opened = {"extra_body": {"chat_template_kwargs": {"opening": "<think>\n"}}}
        assert _whole(client, seed=2, **opened) == (expected, "stop")
        closed = {"extra_body": {"chat_template_kwargs": {"opening": "<think>\n\n</think>\n\n"}}}
        assert _whole(client, seed=1, **closed) == ({"role": "assistant", "content": "Four."}, "stop")
    parser = {"reasoning_parser": ReasoningFormat.DEEPSEEK_R1}
    with script_client(chat_template(), thought.partition("<think>")[2], **parser) as client:
        assert _whole(client) == (expected, "stop")
    with script_client(chat_template(thinks=True), thought, reasoning_parser=ReasoningFormat.NONE) as client:
        assert _whole(client)[0]["content"] == "\nHm, 2 + 2.\n\n\nFour."  # with the tags hidden: special


def test_reasoning_comes_before_calls() -> None:
    format = ToolFormat.HERMES
    thought = "<think>I could say <tool_call></think>\n"
    with script_client(chat_template(format, thinks=True), thought + ANSWERS[format]) as client:
        message, end = _whole(client, tools=[WEATHER])
        assert (message["reasoning"], message["content"], end) == (
            "I could say <tool_call>",
            "Well.",
            "tool_calls",
        )
        assert len(message["tool_calls"]) == 2


def test_each_choice_has_a_reader_of_its_own() -> None:
    answers = ("<tool_call>{}", ANSWERS[ToolFormat.HERMES], "Three.")
    with script_client(chat_template(ToolFormat.HERMES), *answers) as client:
        options = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "seed": 0, "n": 3}
        choices = client.chat.completions.create(**options).choices
        assert [choice.finish_reason for choice in choices] == ["stop", "tool_calls", "stop"]
        assert [choice.message.content for choice in choices] == ["<tool_call>{}", "Well.", "Three."]
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(stream=True, **options):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == ["<tool_call>{}", "Well.", "Three."]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice is 'f', which is not",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name must be"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 2**16}}}]},
            "tools.0.function.parameters has .* the limit is 65536",
        ),
    ],
)
def test_tools_that_cannot_be_called(fields: dict[str, Any], message: str) -> None:
    with (
        script_client(chat_template(ToolFormat.HERMES), "Hi") as client,
        pytest.raises(openai.BadRequestError, match=message) as wrong,
    ):
        _whole(client, **{"tools": [WEATHER], **fields})
    assert wrong.value.param == message.partition(" ")[0]
