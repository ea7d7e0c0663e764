"""Chat templates render as their models expect, and refuse what they cannot render."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.text.chat_template import ChatTemplate

TEMPLATES = (
    "HuggingFaceTB-SmolLM3-3B",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-QwQ-32B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen3-Coder",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <now> & here",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "é"}},
            "required": ["city"],
        },
    },
}
HI = {"role": "user", "content": "Hi"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    HI,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _template(source: str, **others: str) -> ChatTemplate:
    sources = {"default": source, **others}
    return ChatTemplate(sources, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def _known(data_dir: Path, name: str) -> ChatTemplate:
    return _template((data_dir / "templates" / "llama_cpp" / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_render_a_conversation(data_dir: Path, name: str) -> None:
    tools = [WEATHER] if "tool_use" in name else None
    turns = TURNS[1:] if "gemma-2" in name else TURNS  # which has no system role
    prompt = _known(data_dir, name).render(turns, tools=tools)
    positions = [prompt.index(turn["content"]) for turn in turns if turn["role"] != "system"]
    assert positions == sorted(positions)
    finished = _known(data_dir, name).render(turns, tools=tools, add_generation_prompt=False)
    assert finished == prompt or len(finished) < len(prompt)


def test_the_list_of_real_templates_is_whole(data_dir: Path) -> None:
    assert sorted(path.stem for path in (data_dir / "templates" / "llama_cpp").glob("*")) == sorted(TEMPLATES)


def test_smollm2_exactly() -> None:
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert _template(SMOLLM2).render([HI]) == prompt
    assert _template(SMOLLM2).render(TURNS[:2], add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_qwen2_5_exactly(data_dir: Path) -> None:
    template = _known(data_dir, "Qwen-Qwen2.5-7B-Instruct")
    assert template.render([HI]) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render(TURNS) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_are_written_without_escapes(data_dir: Path) -> None:
    prompt = _known(data_dir, "Qwen-Qwen2.5-7B-Instruct").render([HI], tools=[WEATHER])
    assert f"<tools>\n{json.dumps(WEATHER, ensure_ascii=False)}\n</tools>" in prompt


def test_llama_3_1_exactly(data_dir: Path) -> None:
    assert _known(data_dir, "meta-llama-Llama-3.1-8B-Instruct").render(TURNS) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama_3_2_is_told_the_date(data_dir: Path) -> None:
    template = _known(data_dir, "meta-llama-Llama-3.2-3B-Instruct")
    assert "\nToday Date: 1 May 2031\n" in template.render([HI], date_string="1 May 2031")
    assert "\nToday Date: " in template.render([HI])


def test_mistral_exactly(data_dir: Path) -> None:
    assert _known(data_dir, "mistralai-Mistral-Nemo-Instruct-2407").render(TURNS) == (
        "<s>[INST]Hi[/INST]Hello.</s>[INST]Be brief.\n\nBye[/INST]"
    )


def test_qwen3_takes_variables(data_dir: Path) -> None:
    template = _known(data_dir, "Qwen-Qwen3-0.6B")
    assert template.render([HI]).endswith("<|im_start|>assistant\n")
    silent = template.render([HI], enable_thinking=False)
    assert silent.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"])
def test_arguments_of_tool_calls_may_be_json_text(data_dir: Path, name: str) -> None:
    def turns(arguments: object) -> list[dict[str, Any]]:
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]

    template = _known(data_dir, name)
    prompt = template.render(turns('{"city": "Öl"}'), tools=[WEATHER])
    assert prompt == template.render(turns({"city": "Öl"}), tools=[WEATHER])
    assert '{"city": "Öl"}' in prompt


@pytest.mark.parametrize("content", ["Hello", "Hello ", [{"type": "text", "text": "Hello"}]])
def test_the_last_message_can_be_continued(data_dir: Path, content: Any) -> None:
    turns = [HI, {"role": "assistant", "content": content}]
    kept = "Hello " if content == "Hello " else "Hello"
    for template, end in ((_template(SMOLLM2), kept), (_known(data_dir, "google-gemma-2-2b-it"), "Hello")):
        prompt = template.render(turns, continue_final_message=True)
        assert prompt.endswith(end)
        assert template.render(turns, add_generation_prompt=False).startswith(prompt)
        assert template.render(turns, continue_final_message=True, add_generation_prompt=False) == prompt
        with pytest.raises(ValueError, match="exclude each other"):
            template.render(turns, continue_final_message=True, add_generation_prompt=True)


def test_a_message_that_the_template_hides_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match="does not show the last message"):
        _template("{{ messages[0].role }}").render([HI], continue_final_message=True)
    with pytest.raises(ValueError, match="no parts"):
        _template(SMOLLM2).render([{"role": "user", "content": []}], continue_final_message=True)


PARTS = {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]}


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "Look\nhere"),
        ("{% for m in messages %}{{ 'u: ' + m['content'] }}{% endfor %}", "u: Look\nhere"),
        (
            "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}",
            "[Look][here]",
        ),
    ],
)
def test_parts_are_joined_where_the_template_wants_a_text(source: str, prompt: str) -> None:
    assert _template(source).render([PARTS]) == prompt


def test_texts_become_parts_where_the_template_wants_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert _template(source).render([HI]) == "[Hi]"
    either = (
        "{% if messages[0].content is string %}{{ messages[0].content }}{% else %}" + source + "{% endif %}"
    )
    assert _template(either).render([HI]) == "Hi"
    assert _template(either).render([PARTS]) == "[Look][here]"


def test_templates_may_mark_generations_and_leave_loops() -> None:
    source = (
        "{% for m in messages %}\n"
        "    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m.content }};{% endgeneration %}\n"
        "{% endfor %}\n"
        "end"
    )
    assert _template(source).render(TURNS) == "Be brief.;Hi;end"


def test_the_template_for_tools_is_taken_with_tools() -> None:
    template = _template("plain", tool_use="tools: {{ tools | length }}")
    assert template.render([HI]) == "plain"
    assert template.render([HI], tools=[]) == "plain"
    assert template.render([HI], tools=[WEATHER]) == "tools: 1"


def test_tools_are_none_where_there_are_none() -> None:
    assert _template("{{ tools is none }}").render([HI], tools=[]) == "True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages[0].content.index('z') }}", "substring not found"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
        ("{{ messages.append(messages) }}", "not safely callable|unsafe"),
        ("{{ messages[0].update(role='x') }}", "not safely callable|unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_a_template_objects_to_is_a_value_error(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"refuses the conversation.*({message})"):
        _template(source).render([HI])


@pytest.mark.parametrize("source", ["{% if %}", "{{ messages", "{% nonsense %}", "{{ x | no_such_filter }}"])
def test_a_broken_template_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError, match="chat template is broken"):
        _template(source).render([HI])


def test_a_model_without_a_template_says_so() -> None:
    template = ChatTemplate({}, special_tokens={})
    assert not template.exists
    with pytest.raises(ValueError, match="no chat template"):
        template.render([HI])
    with pytest.raises(ValueError, match=r"no default chat template.*\['rag'\]"):
        ChatTemplate({"rag": "x"}, special_tokens={}).render([HI])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list of objects"),
        ([HI, "hi"], "messages must be a list of objects"),
        (HI, "messages must be a list of objects"),
        ([HI, {"content": "x"}], r"messages\[1\] needs a role, got None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a role, got 3"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a text"),
        ([{"role": "user", "content": [3]}], r"messages\[0\]\.content\[0\] must be"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"messages\[0\]\.content\[0\] must be .*image_url",
        ),
        ([{"role": "user", "content": "x", "extra": object()}], "object is not JSON"),
        ([{"role": "user", "content": "x", "extra": b"x"}], "bytes is not JSON"),
    ],
)
def test_bad_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _template(SMOLLM2).render(messages)


def test_deep_messages_are_refused() -> None:
    deep: Mapping[str, Any] = {}
    for _ in range(100):
        deep = {"deeper": deep}
    with pytest.raises(ValueError, match="64 deep"):
        _template(SMOLLM2).render([HI | {"extra": deep}])


def test_the_conversation_is_no_variable() -> None:
    with pytest.raises(ValueError, match="messages cannot be a template variable"):
        _template(SMOLLM2).render([HI], messages=[])
    assert _template("{{ documents }} {{ bos_token }}").render([HI]) == "None <s>"
    assert _template("{{ documents }} {{ bos_token }}").render([HI], documents=[1], bos_token="b") == "[1] b"
