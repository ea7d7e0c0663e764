"""Reasoning is told from the answer wherever a text is cut, and only where the model reasons."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.text.answers.answer_formats import AnswerFormat, ReasoningFormat, ToolFormat, answer_format
from albireo_jax.text.answers.reasoning import ReasoningDelta, ReasoningSplitter, Thinking, thinking
from albireo_jax.text.chat_template import ChatTemplate

PIECES = ("<think>", "</think>", "<", "</", "think>", "<thi", " ", "\n", "Hm.", "é", "Yes.", "\t", "\xa0")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def _split(pieces: Sequence[str], *, inside: bool) -> ReasoningDelta:
    splitter = ReasoningSplitter(inside=inside)
    deltas = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    for earlier, later in itertools.pairwise(delta for delta in deltas if any(delta)):
        assert not (earlier.content and later.reasoning)
    return ReasoningDelta(
        "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)
    )


def _expected(text: str, *, inside: bool) -> ReasoningDelta:
    """The same by searching the whole text."""
    spaces = " \t\n\r"
    begun = text.lstrip(spaces).startswith("<think>")
    if not begun and not inside:
        return ReasoningDelta("", text)
    body = text.lstrip(spaces).removeprefix("<think>")
    reasoning, _, content = body.partition("</think>")
    return ReasoningDelta(reasoning.strip(spaces), content.lstrip(spaces))


@given(TEXTS, st.booleans(), st.lists(st.integers(0, 80), max_size=8))
def test_every_cut_gives_what_a_search_of_the_whole_gives(text: str, inside: bool, cuts: list[int]) -> None:
    ends = sorted({cut % (len(text) + 1) for cut in cuts})
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]
    expected = _expected(text, inside=inside)
    for cut in (pieces, [text], list(text)):
        assert _split(cut, inside=inside) == expected


def test_reasoning_comes_as_it_is_thought() -> None:
    splitter = ReasoningSplitter(inside=False)
    assert splitter.push("<think>\nLet me") == ReasoningDelta("Let me", "")
    assert splitter.push(" see.\n") == ReasoningDelta(" see.", "")
    assert splitter.push("</think>\n\nFour") == ReasoningDelta("", "Four")
    assert splitter.push("!\n") == ReasoningDelta("", "!\n")
    assert splitter.finish() == ReasoningDelta("", "")


@pytest.mark.parametrize("unit", ["<", "</", " ", "<think>", "</think>", "</think", "x"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.usefixtures("no_collector")
def test_a_hostile_megabyte_takes_well_under_a_second(unit: str, inside: bool) -> None:
    text = (unit * 10**6)[: 10**6]
    started_s = time.thread_time()
    _split([text], inside=inside)
    _split([text[start : start + 100] for start in range(0, len(text), 100)], inside=inside)
    assert time.thread_time() - started_s < 1


BEGUN, POSSIBLE, OVER = Thinking


@pytest.mark.parametrize(
    ("prompt", "qwen3", "deepseek_r1"),
    [
        ("<|im_start|>assistant\n", POSSIBLE, BEGUN),
        ("<|im_start|>assistant\n<think>\n", BEGUN, BEGUN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", OVER, OVER),
        ("What does <think> mean?<|im_start|>assistant\n", POSSIBLE, BEGUN),
        ("", POSSIBLE, BEGUN),
    ],
)
def test_the_prompt_says_whether_the_model_thinks_already(
    prompt: str, qwen3: Thinking, deepseek_r1: Thinking
) -> None:
    assert thinking(ReasoningFormat.QWEN3, prompt) is qwen3
    assert thinking(ReasoningFormat.DEEPSEEK_R1, prompt) is deepseek_r1
    assert thinking(ReasoningFormat.NONE, prompt) is OVER


_T, _R = ToolFormat, ReasoningFormat


@pytest.mark.parametrize(
    ("name", "tools", "reasoning", "begins"),
    [
        ("HuggingFaceTB-SmolLM3-3B", _T.NONE, _R.QWEN3, POSSIBLE),
        ("Mistral-Small-3.2-24B-Instruct-2506", _T.MISTRAL, _R.NONE, OVER),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", _T.HERMES, _R.NONE, OVER),
        ("Qwen-QwQ-32B", _T.HERMES, _R.QWEN3, BEGUN),
        ("Qwen-Qwen2.5-7B-Instruct", _T.HERMES, _R.NONE, OVER),
        ("Qwen-Qwen3-0.6B", _T.HERMES, _R.QWEN3, POSSIBLE),
        ("Qwen3-Coder", _T.NONE, _R.NONE, OVER),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", _T.NONE, _R.DEEPSEEK_R1, BEGUN),
        ("deepseek-ai-DeepSeek-V3.1", _T.NONE, _R.DEEPSEEK_R1, BEGUN),
        ("google-gemma-2-2b-it", _T.NONE, _R.NONE, OVER),
        ("meta-llama-Llama-3.1-8B-Instruct", _T.LLAMA3_JSON, _R.NONE, OVER),
        ("meta-llama-Llama-3.2-3B-Instruct", _T.LLAMA3_JSON, _R.NONE, OVER),
        ("meta-llama-Llama-3.3-70B-Instruct", _T.LLAMA3_JSON, _R.NONE, OVER),
        ("mistralai-Mistral-Nemo-Instruct-2407", _T.MISTRAL, _R.NONE, OVER),
        ("openai-gpt-oss-120b", _T.NONE, _R.NONE, OVER),
    ],
)
def test_real_templates_say_how_their_models_answer(
    data_dir: Path, name: str, tools: ToolFormat, reasoning: ReasoningFormat, begins: Thinking
) -> None:
    source = (data_dir / "templates" / "llama_cpp" / f"{name}.jinja").read_text(encoding="utf-8")
    assert answer_format(source) == AnswerFormat(
        tools=tools, reasoning=reasoning, names_first="Small-3.2" in name
    )
    template = ChatTemplate({"default": source}, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    hi = [{"role": "user", "content": "Hi"}]
    weather = {"name": "weather", "description": "", "parameters": {"properties": {}}}
    options = {"tools": [{"type": "function", "function": weather}] if "tool_use" in name else None}
    assert thinking(reasoning, template.render(hi, enable_thinking=True, **options)) is begins
    assert thinking(reasoning, template.render(hi, enable_thinking=False, **options)) is OVER


def test_what_is_given_is_not_guessed() -> None:
    template = "<tool_call> <think>"
    assert answer_format(template) == AnswerFormat(tools=_T.HERMES, reasoning=_R.QWEN3)
    assert answer_format(template, tools=_T.NONE) == AnswerFormat(reasoning=_R.QWEN3)
    assert answer_format("", tools=_T.MISTRAL, reasoning=_R.DEEPSEEK_R1) == AnswerFormat(
        tools=_T.MISTRAL, reasoning=_R.DEEPSEEK_R1
    )


def test_special_tokens_that_a_parser_needs_are_shown() -> None:
    llama = answer_format("<|python_tag|>")
    assert llama.shown_tokens(tools=True) == ("<|python_tag|>",)
    assert llama.shown_tokens(tools=False) == ()
    assert answer_format("<think>").shown_tokens(tools=True) == ("<think>", "</think>")
