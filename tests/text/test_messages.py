"""Conversations are read as callers write them, and content reaches templates in a form that they show."""

import json
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.text.answers.json_repair import repaired_object
from albireo_jax.text.chat_template import ChatTemplate
from albireo_jax.text.messages import read_conversation, read_tools

HI = {"role": "user", "content": "Hi"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}
SHOWN = "{% for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}"


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _calls(*arguments: Any) -> list[Any]:
    return [{"function": {"name": "clock", "arguments": value}} for value in arguments]


@pytest.mark.parametrize("arguments", [None, "", " ", "null", "{}", {}, " {}\n"])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    (message,) = read_conversation([{"role": "assistant", "tool_calls": _calls(arguments)}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"city": "Ro', {"city": "Ro"}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": [1, {"b": "x\\', {"a": [1, {"b": "x"}]}),
        ('{"a": tr', {}),
        ('{"a": 1,', {"a": 1}),
        ("{'a': True, 'b': 'it", {"a": True, "b": "it"}),
        ('{"a": "New\nYork"}', {"a": "New\nYork"}),
        ('{"a": "}{", "b": [1, 2', {"a": "}{", "b": [1, 2]}),
        ("{", {}),
    ],
)
def test_arguments_that_break_off_are_closed(text: str, value: dict[str, Any]) -> None:
    assert repaired_object(text) == value
    (message,) = read_conversation([{"role": "assistant", "tool_calls": _calls(text)}])
    assert message["tool_calls"][0]["function"]["arguments"] == value


def test_calls_and_results_are_named() -> None:
    result = {"role": "tool", "content": None}
    turns = [{"role": "assistant", "content": "", "tool_calls": _calls("{}", "{}")}, result, result, result]
    first, *results = read_conversation(turns)
    assert [call["id"] for call in first["tool_calls"]] == ["call_1", "call_2"]
    assert [call["type"] for call in first["tool_calls"]] == ["function"] * 2
    assert [message.get("tool_call_id") for message in results] == ["call_1", "call_2", None]
    assert results[0]["content"] == ""
    named = [
        {"role": "assistant", "tool_calls": [CALL | {"id": "call_é-0123456789"}]},
        {**result, "tool_call_id": "call_é-0123456789"},
    ]
    message, answer = read_conversation(named, short_ids=True)
    assert message["tool_calls"][0]["id"] == answer["tool_call_id"] == "123456789"


def test_fields_of_answers_are_not_the_templates() -> None:
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning": "Hm.",
        "reasoning_content": None,
    }
    assert read_conversation([answer]) == [{"role": "assistant", "content": "", "reasoning_content": "Hm."}]
    assert read_conversation([{"role": "developer", "content": "x", "mood": "good"}]) == [
        {"role": "system", "content": "x", "mood": "good"}
    ]
    assert read_tools(
        [{"type": "function", "function": {"name": "f", "strict": True, "description": None}}]
    ) == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    assert read_tools([]) is None


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user"}, r"messages\[0\]: content is required for the role user"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, "are for the role assistant, not user"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\].*'image_url' is not supported"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "type 'custom' is not supported"),
        ({"role": "assistant", "tool_calls": _calls([1])}, "arguments must be JSON text or an object"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "name is required"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call is not supported"),
        ({"role": "tool", "tool_call_id": 3, "content": ""}, "tool_call_id must be a text"),
    ],
)
def test_faults_are_named(message: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read_conversation([message])


SOURCES = {
    "text of all": SHOWN,
    "parts of users": "{% for m in messages %}[{{ m.role }} "
    "{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }} {% endfor %}{% else %}{{ m.content }}{% endif %}]{% endfor %}",
    "parts of all": "{% for m in messages %}[{{ m.role }} "
    "{% for p in m.content %}{{ p.text }} {% endfor %}]{% endfor %}",
    "the first part": "{% for m in messages %}[{{ m.role }} {{ m.content[0].text }}]{% endfor %}",
    "JSON": "{% for m in messages %}[{{ m.role }} {{ m.content | tojson }}]{% endfor %}",
    "parts of results": "{% for m in messages %}[{{ m.role }} "
    "{% if m.role == 'tool' %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %}]{% endfor %}",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "critic"])
def test_every_role_is_shown_whatever_its_content(source: str, role: str) -> None:
    template = ChatTemplate({"default": source}, special_tokens={})
    for content, texts in (
        ("one", ["one"]),
        (_parts("one"), ["one"]),
        (_parts("one", "two"), ["one", "two"]),
    ):
        prompt = template.render([HI, {"role": role, "content": content}])
        assert all(text in prompt for text in texts), prompt
        assert "type" not in prompt


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen3-0.6B",
        "Mistral-Small-3.2-24B-Instruct-2506",
        "Qwen3-Coder",
        "meta-llama-Llama-3.1-8B-Instruct",
        "deepseek-ai-DeepSeek-V3.1",
    ],
)
def test_real_templates_show_parts_of_every_role(data_dir: Path, name: str) -> None:
    source = (data_dir / "templates" / "llama_cpp" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate({"default": source}, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    turns = [
        {"role": "system", "content": _parts("S one", "S two")},
        {"role": "user", "content": _parts("U one", "U two")},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": _parts("T one", "T two")},
        {"role": "assistant", "content": _parts("A one", "A two")},
        {"role": "user", "content": "Bye"},
    ]
    prompt = template.render(turns, tools=[CLOCK])
    for text in ("S one", "S two", "U one", "U two", "T one", "T two", "A one", "A two"):
        assert text in prompt
    assert "'type'" not in prompt
    cut = json.dumps(turns[2]).replace('"{}"', json.dumps('{"zone": "Eu'))
    assert "Eu" in template.render([HI, json.loads(cut), turns[3]], tools=[CLOCK])


def test_a_template_that_goes_on_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo_jax.text.chat_template._MAX_RENDER_S", 0.2)
    monkeypatch.setattr("albireo_jax.text.chat_template._MAX_PROBE_S", 0.02)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    calls = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
    for source in (loops, calls):
        with pytest.raises(ValueError, match="takes more than"):
            ChatTemplate({"default": source}, special_tokens={}).render([HI])
