"""Forms of prompts, conversations and parameters that the LLM object takes, and those that it refuses."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax import LLM, SamplingParams
from albireo_jax.core.errors import EngineDeadError
from albireo_jax.engine.prompts import read_conversations, read_prompts
from tests.labs.engine_lab import Lab, lab

IDS = [10, 11, 12]
TEXT = "abc"
MESSAGES = [{"role": "user", "content": "Hi"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

ONE_PROMPT: dict[str, Any] = {
    "a text": (TEXT, TEXT),
    "a NumPy text": (np.str_(TEXT), TEXT),
    "a list of ids": (IDS, IDS),
    "a tuple of ids": (tuple(IDS), IDS),
    "a range": (range(10, 13), IDS),
    "NumPy ids": (np.array(IDS), IDS),
    "small NumPy ids": (np.array(IDS, np.uint8), IDS),
    "JAX ids": (jnp.array(IDS), IDS),
    "a list of NumPy ids": (list(np.array(IDS)), IDS),
    "a list of arrays without axes": ([np.array(i) for i in IDS], IDS),
    "a list of JAX scalars": (list(jnp.array(IDS)), IDS),
    "a dict with a prompt": ({"prompt": TEXT}, TEXT),
    "a dict with ids as prompt": ({"prompt": IDS}, IDS),
    "a dict with token ids": ({"prompt_token_ids": IDS}, IDS),
    "a dict with an array": ({"prompt_token_ids": np.array(IDS)}, IDS),
    "a dict with keys that hold nothing": ({"prompt": TEXT, "multi_modal_data": None}, TEXT),
    "messages": (MESSAGES, MESSAGES),
    "messages in a tuple": (tuple(MESSAGES), MESSAGES),
    "messages with parts": (PARTS, MESSAGES),
    "a dict with messages": ({"messages": MESSAGES}, MESSAGES),
}

SEVERAL_PROMPTS: dict[str, Any] = {
    "nothing": ([], []),
    "texts": (["ab", "c"], ["ab", "c"]),
    "a tuple of texts": (("ab", "c"), ["ab", "c"]),
    "an array of texts": (np.array(["ab", "c"]), ["ab", "c"]),
    "lists of ids": ([IDS, IDS], [IDS, IDS]),
    "texts and ids": (["ab", IDS], ["ab", IDS]),
    "rows of an array": (np.array([IDS, IDS]), [IDS, IDS]),
    "rows of a JAX array": (jnp.array([IDS, IDS]), [IDS, IDS]),
    "arrays of different lengths": ([np.array(IDS), np.array([5])], [IDS, [5]]),
    "dicts": ([{"prompt": "ab"}, {"prompt_token_ids": IDS}], ["ab", IDS]),
    "conversations": ([MESSAGES, PARTS], [MESSAGES, MESSAGES]),
    "a dict's values": ({1: "ab", 2: "c"}.values(), ["ab", "c"]),
}

REFUSED_PROMPTS: dict[str, Any] = {
    "None": (None, "prompts must be a text, token ids"),
    "bytes": (b"abc", "prompts must be a text, token ids"),
    "a number": (3, "prompts must be a text, token ids"),
    "an array without axes": (np.array(3), "prompts must be a text, token ids"),
    "a path": (Path("abc"), "prompts must be a text, token ids"),
    "a set": ({1, 2}, "prompts must be a text, token ids"),
    "floats": ([1.0, 2.0], "a token id of prompts must be an integer, got 1.0"),
    "an array of floats": (np.array([1.0]), "a token id of prompts must be an integer"),
    "rows of floats": (np.array([[1.0]]), r"prompts\[0\] is an array of float64, token ids are integers"),
    "three axes": (np.zeros((1, 1, 1), int), r"prompts\[0\] is an array of shape \(1, 1\)"),
    "true": ([True, 1], "a token id of prompts must be an integer, got True"),
    "true in an array": (np.array([[True]]), r"prompts\[0\] is an array of bool"),
    "ids, then a text": ([1, "a"], "a token id of prompts must be an integer, got 'a'"),
    "a text, then an id": (["a", 1], r"prompts\[1\] must be a text, token ids"),
    "None in a list": ([None], r"prompts\[0\] must be a text, token ids"),
    "bytes in a list": ([b"a"], r"prompts\[0\] must be a text, token ids"),
    "an empty text": ([""], "the prompt is empty"),
    "empty ids": ([[]], "the prompt is empty"),
    "nested too deep": ([[[1]]], r"a token id of prompts\[0\] must be an integer, got \[1\]"),
    "an id below zero": ([-1], "a token id of prompts must be at least 0, got -1"),
    "an id outside the vocabulary": ([5000], "token id 5000 is outside the vocabulary"),
    "an id beyond 32 bits": ([2**31], f"a token id of prompts must be .*, got {2**31}"),
    "an id beyond 64 bits": ([2**64], f"a token id of prompts must be .*, got {2**64}"),
    "a single message": ({"role": "user", "content": "Hi"}, "prompts is a single message"),
    "an empty dict": ({}, "prompts has none of"),
    "a dict with another key": ({"prompt": "a", "multi_modal_data": 1}, "has 'multi_modal_data'"),
    "a dict with both": ({"prompt": "a", "prompt_token_ids": IDS}, "a prompt has one of them"),
    "a dict with a text as ids": ({"prompt_token_ids": "a"}, "must be token ids, got 'a'"),
    "a dict with a number": ([{"prompt": 3}], r"prompts\[0\]\['prompt'\] must be a text, token ids"),
    "a message and a text": ([MESSAGES[0], "a"], r"prompts\[1\] must be a message"),
}

CHATS: dict[str, Any] = {
    "a text": ("Hi", [MESSAGES]),
    "messages": (MESSAGES, [MESSAGES]),
    "messages with parts": (PARTS, [MESSAGES]),
    "a dict with messages": ({"messages": MESSAGES}, [MESSAGES]),
    "conversations": ([MESSAGES, PARTS], [MESSAGES, MESSAGES]),
    "dicts with messages": ([{"messages": MESSAGES}] * 2, [MESSAGES, MESSAGES]),
    "no conversation": ([], []),
}

REFUSED_CHATS: dict[str, Any] = {
    "None": (None, "messages must be a list of messages"),
    "bytes": (b"Hi", "messages must be a list of messages"),
    "one message": (MESSAGES[0], "messages must be a list of messages"),
    "texts": (["Hi", "Hello"], r"messages\[0\] must be a list of messages with role and content, got 'Hi'"),
    "token ids": ([1, 2], r"messages\[0\] must be a list of messages"),
    "an empty conversation": ([[]], r"messages\[0\] is empty, at least 1 message is needed"),
    "a message without role": ([{"content": "Hi"}], r"messages\[0\] needs a role"),
    "a message and a text": ([MESSAGES[0], "Hi"], r"messages\[1\] must be a message"),
    "a number as content": ([{"role": "user", "content": 3}], "content must be a text or a list of parts"),
    "messages beside another key": ({"messages": MESSAGES, "tools": [1]}, "has 'tools' beside 'messages'"),
}

REFUSED_PARAMS: dict[str, Any] = {
    "a dict": ({"max_tokens": 2}, r"got a dict; write SamplingParams\(\*\*"),
    "a number": (2, "params must be a SamplingParams"),
    "a text": ("greedy", "params must be a SamplingParams"),
    "None in a list": ([None], r"params\[0\] is None"),
    "too few": ([], "1 prompts but 0 sampling parameters"),
    "too many": ([GREEDY] * 2, "1 prompts but 2 sampling parameters"),
    "a longer answer than fits": (SamplingParams(max_tokens=10**6), "exceed the model's limit"),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Lab]:
    with lab() as running:
        yield running


@pytest.fixture
def llm(engine: Lab) -> LLM:
    """The Python API over a simulated engine."""
    made = object.__new__(LLM)
    made.engine = engine  # type: ignore[assignment]
    return made


def _tokens(llm: LLM, prompts: Any) -> list[tuple[int, ...]]:
    return [generation.outputs[0].token_ids for generation in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize("form", ONE_PROMPT)
def test_a_prompt_means_the_same_in_every_form_and_call(llm: LLM, form: str) -> None:
    given, plain = ONE_PROMPT[form]
    [expected] = _tokens(llm, [plain])
    assert _tokens(llm, given) == [expected]
    assert _tokens(llm, [given, given]) == [expected] * 2
    assert _tokens(llm, (item for item in [given])) == [expected]
    streamed = [token_id for delta in llm.stream(given, GREEDY) for token_id in delta.token_ids]
    assert tuple(streamed) == expected
    if plain is MESSAGES:
        assert [answer.outputs[0].token_ids for answer in llm.chat(given, GREEDY)] == [expected]


@pytest.mark.parametrize("form", SEVERAL_PROMPTS)
def test_several_prompts_mean_the_same_in_every_form(llm: LLM, form: str) -> None:
    given, plain = SEVERAL_PROMPTS[form]
    expected = [tokens for prompt in plain for tokens in _tokens(llm, [prompt])]
    assert _tokens(llm, given) == expected
    with pytest.raises(ValueError, match=f"stream takes one prompt, got {len(plain)}"):
        llm.stream(given, GREEDY)
    each = (
        SamplingParams(max_tokens=count + 1, temperature=0, ignore_eos=True) for count in range(len(plain))
    )
    answers = llm.generate(given, each)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [1, 2][: len(plain)]


@pytest.mark.parametrize("form", REFUSED_PROMPTS)
def test_other_prompts_are_refused_when_they_are_given(llm: LLM, form: str) -> None:
    given, message = REFUSED_PROMPTS[form]
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=message):
            call(given, GREEDY)
    _check_idle(llm)


@pytest.mark.parametrize("form", CHATS)
def test_conversations_mean_the_same_in_every_form(llm: LLM, form: str) -> None:
    given, plain = CHATS[form]
    answers = llm.chat(given, GREEDY)
    assert [answer.outputs[0].token_ids for answer in answers] == _tokens(llm, plain)
    assert len(read_conversations(given)) == len(plain)


@pytest.mark.parametrize("form", REFUSED_CHATS)
def test_other_conversations_are_refused(llm: LLM, form: str) -> None:
    given, message = REFUSED_CHATS[form]
    with pytest.raises(ValueError, match=message):
        llm.chat(given, GREEDY)
    _check_idle(llm)


def test_a_chat_is_rendered_as_it_is_asked_for(llm: LLM) -> None:
    said = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    tokenizer = llm.engine.tokenizer
    for options in (
        {},
        {"continue_final_message": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": np.bool_(True)},
    ):
        [answer] = llm.chat(said, GREEDY, **options)
        assert list(answer.prompt_token_ids) == tokenizer.encode_chat(said, **options)
    [answer] = llm.chat(said, GREEDY, chat_template_kwargs={"add_something": 1}, tools=iter([]))
    assert list(answer.prompt_token_ids) == tokenizer.encode_chat(said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": {"type": "function"}}, "tools must be a list of function schemas, got"),
        ({"tools": ["search"]}, r"tools must be a list of objects, got \['search'\]"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt must be true or false, got 'yes'"),
        ({"continue_final_message": 1}, "continue_final_message must be true or false, got 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "must map names of variables to values"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs cannot hold 'messages'"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs cannot hold 'tools'"),
    ],
)
def test_other_ways_to_render_a_chat_are_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat(MESSAGES, GREEDY, **options)
    _check_idle(llm)


@pytest.mark.parametrize("form", REFUSED_PARAMS)
def test_other_parameters_are_refused_by_every_call(llm: LLM, form: str) -> None:
    given, message = REFUSED_PARAMS[form]
    for call, prompt in ((llm.generate, TEXT), (llm.stream, TEXT), (llm.chat, MESSAGES)):
        with pytest.raises(ValueError, match=message):
            call(prompt, given)  # type: ignore[operator]
    _check_idle(llm)


def test_a_stream_that_nobody_reads_leaves_no_request(llm: LLM) -> None:
    long = SamplingParams(max_tokens=500, ignore_eos=True)
    llm.stream(TEXT, long)
    kept = llm.stream(TEXT, long)
    next(kept)
    kept.close()  # type: ignore[attr-defined]
    assert list(kept) == []
    _check_idle(llm)


def test_two_threads_may_generate_at_once(llm: LLM) -> None:
    expected = _tokens(llm, ["ab", IDS])
    got: list[list[tuple[int, ...]]] = []
    threads = [Thread(target=lambda: got.append(_tokens(llm, ["ab", IDS]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == [expected] * 2


def test_a_closed_engine_says_so() -> None:
    with lab() as running:
        llm = object.__new__(LLM)
        llm.engine = running  # type: ignore[assignment]
        with llm:
            assert len(_tokens(llm, TEXT)) == 1
        llm.close()
        for call in (llm.generate, llm.stream):
            with pytest.raises(EngineDeadError, match="stopped"):
                call(TEXT, GREEDY)
        with pytest.raises(EngineDeadError, match="stopped"), llm:
            pass


def test_an_llm_is_not_pickled_or_copied(llm: LLM) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(pickle.PicklingError, match="make one in each process"):
            attempt(llm)  # type: ignore[operator]


def test_the_task_table_prints_as_a_table(llm: LLM) -> None:
    text = str(llm.task_table())
    assert text.splitlines()[0].split() == ["task", "µs", "per", "step", "exposed"]
    assert "T3" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, r"dtype must be one of \['auto', 'float32', 'bfloat16'\], got 'float16'"),
        ({"dtype": np.float32}, r"dtype must be one of \['auto', 'float32', 'bfloat16'\]"),
        ({"quantization": "awq"}, r"quantization must be one of \['int8', 'fp8', 'fp8_w8a16'\], got 'awq'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"kv_cache_dtype must be one of \['auto', .*'fp8'\], got"),
        ({"attention": "flash"}, r"attention must be one of \['auto', 'xla', 'cuda'\], got 'flash'"),
        ({"sampling": None}, r"sampling must be one of \['sharded', 'replicated'\], got None"),
        ({"tp": 0}, r"tp must be one of \[1, 2, 4, 8\], got 0"),
        ({"tp": True}, r"tp must be one of \[1, 2, 4, 8\], got True"),
        ({"tp": "2"}, r"tp must be one of \[1, 2, 4, 8\], got '2'"),
        ({"tp": np.int64(3)}, r"tp must be one of \[1, 2, 4, 8\], got .*3"),
        ({"virtual_devices": -1}, "virtual_devices must be at least 0, got -1"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"num_pages": "4"}, "num_pages must be an integer, got '4'"),
        ({"page_size": 16.0}, "page_size must be an integer, got 16.0"),
        ({"max_model_len": 1}, "max_model_len must be at least 2, got 1"),
        ({"max_rows": 2**40}, "max_rows must be between 1 and"),
        ({"memory_share": -0.5}, "memory_share must be above 0 and below 1, got -0.5"),
        ({"memory_share": "0.5"}, "memory_share must be a finite number, got '0.5'"),
        ({"host_kv_memory_bytes": -1}, "host_memory_bytes must not be negative, got -1"),
        ({"prefix_caching": 1}, "prefix_caching must be true or false, got 1"),
        ({"measure_sampling": "yes"}, "measure_sampling must be true or false, got 'yes'"),
        ({"max_row": 4}, "LLM has no option 'max_row'; did you mean 'max_rows'"),
        ({"tensor_parallel_size": 2}, "LLM has no option 'tensor_parallel_size'; did you mean 'tp'"),
        ({"trust_remote_code": True}, "LLM has no option 'trust_remote_code'; those known are"),
    ],
)
def test_options_are_refused_before_a_model_is_looked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("no such model", **options)


@pytest.mark.parametrize("model", [None, "", 3, b"smollm2"])
def test_a_model_is_a_name_or_a_path(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be a name or a path"):
        LLM(model)


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"tp": np.int64(1)}, {"num_pages": np.array(4)}])
def test_options_in_other_types_are_taken(options: dict[str, Any]) -> None:
    for model in ("no such model", Path("no such model")):
        with pytest.raises(ValueError, match="no model 'no such model'"):
            LLM(model, **options)


def test_reading_prompts_changes_no_text_or_ids() -> None:
    assert read_prompts(IDS) == [tuple(IDS)]
    assert type(read_prompts(np.array(IDS))[0][0]) is int
    assert type(read_prompts(np.str_(TEXT))[0]) is str


def _check_idle(llm: LLM) -> None:
    assert llm.engine.service.drain(10)
    assert llm.engine.service.stats().pages_in_use == 0
