"""Caller's parameters: what is taken, and what is refused with the value and the limit."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from albireo_jax.core.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.errors import ContextLengthError, UnknownModelError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.core.token_sampling import GREEDY
from albireo_jax.core.types import Request, SamplingParams

LIMITS = EngineLimits(max_model_len=100, vocab_size=512, num_pages=4, page_size=16)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"temperature must be in \[0, 100\], got -0.1"),
        ("temperature", math.nan, "temperature must be a finite number, got nan"),
        ("temperature", math.inf, "temperature must be a finite number, got inf"),
        ("temperature", "1", "temperature must be a finite number, got '1'"),
        ("top_p", -0.1, r"top_p must be in \[0, 1\], got -0.1"),
        ("top_p", 1.5, r"top_p must be in \[0, 1\], got 1.5"),
        ("min_p", -1, r"min_p must be in \[0, 1\], got -1"),
        ("top_k", -2, "top_k must be at least 0, got -2"),
        ("top_k", 1.5, "top_k must be an integer, got 1.5"),
        ("top_k", True, "top_k must be an integer, got True"),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("min_tokens", 17, "min_tokens 17 exceeds max_tokens 16"),
        ("seed", -2, "seed must be between -1 and"),
        ("seed", 2**63, "seed must be between -1 and"),
        ("n", 0, "n must be between 1 and 128, got 0"),
        ("stop", ("",), "stop must hold non-empty strings"),
        ("stop_token_ids", tuple(range(33)), "33 ids, the limit is 32"),
        ("temperature", 10**400, r"temperature must be in \[0, 100\], got 1000"),
        ("temperature", np.array([0.5, 0.5]), "temperature must be a finite number, got array"),
        ("max_tokens", np.float32(2), "max_tokens must be an integer, got"),
        ("max_tokens", np.bool_(True), "max_tokens must be an integer, got"),
        ("max_tokens", 2**31, f"max_tokens must be between 1 and {2**31 - 1}, got {2**31}"),
        ("top_k", 3_000_000_000, f"top_k must be between 0 and {2**31 - 1}, got 3000000000"),
        ("top_k", None, "top_k must be an integer, got None"),
        ("logprobs", True, "logprobs must be an integer, got True"),
        ("ignore_eos", 1, "ignore_eos must be true or false, got 1"),
        ("skip_special_tokens", "no", "skip_special_tokens must be true or false, got 'no'"),
        ("stop", b"x", "stop must be a list of texts, got b'x'"),
        ("stop", 3, "stop must be a list of texts, got 3"),
        ("stop", [None], "stop must hold non-empty strings, got None"),
        ("stop", {"a", "b"}, "stop must be a list of texts, got"),
        ("stop_token_ids", 3, "stop_token_ids must be a list of token ids, got 3"),
        ("stop_token_ids", [True], "stop_token_ids must be an integer, got True"),
        ("stop_token_ids", [2**31], "stop_token_ids must be between 0 and"),
        ("allowed_token_ids", np.array([1.0]), "allowed_token_ids must be an integer, got"),
        ("allowed_token_ids", np.array(1), "allowed_token_ids must be a list of token ids, got"),
        ("logit_bias", [5], r"logit_bias must map token ids to numbers, got \[5\]"),
        ("logit_bias", {"5": 1.0}, "logit_bias must be an integer, got '5'"),
        ("logit_bias", {5: "1"}, "logit_bias of token 5 must be a finite number, got '1'"),
        ("structured", {"type": "json_object"}, "structured must be a StructuredOutput, got"),
    ],
)
def test_bad_parameters_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "given", [{"top_p": 0}, {"temperature": 5e-324}, {"temperature": 9e-6}, {"temperature": 0, "top_p": 0.5}]
)
def test_no_mass_and_almost_no_temperature_are_greedy(given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert params.temperature == 0
    assert params.top_p > 0
    assert SamplingParams(temperature=1e-5).temperature == 1e-5


def test_minus_1_is_no_seed_and_every_log_probability() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert LIMITS.resolve_logprobs("logprobs", 7) == 7
    assert LIMITS.resolve_logprobs("logprobs", None) is None
    with pytest.raises(ValueError, match=r"logprobs -1 asks for all 512 tokens .* the limit is 20"):
        LIMITS.resolve_logprobs("logprobs", SamplingParams(logprobs=-1).logprobs)
    assert replace(LIMITS, vocab_size=12).resolve_logprobs("logprobs", -1) == 12


def test_a_single_stop_string_and_lists_are_taken() -> None:
    assert SamplingParams(stop="x").stop == ("x",)  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.array(0.5), 0.5),
        ("temperature", 1, 1.0),
        ("max_tokens", np.int32(2), 2),
        ("max_tokens", np.array(2), 2),
        ("seed", np.uint64(3), 3),
        ("top_k", np.int64(-1), 0),
        ("ignore_eos", np.bool_(True), True),
        ("stop", None, ()),
        ("stop", ["a", np.str_("b")], ("a", "b")),
        ("bad_words", np.array(["a"]), ("a",)),
        ("stop_token_ids", None, ()),
        ("stop_token_ids", [np.int64(1)], (1,)),
        ("stop_token_ids", (i for i in (1, 2)), (1, 2)),
        ("allowed_token_ids", np.array([5, 6]), (5, 6)),
        ("logit_bias", {np.int64(5): np.float32(1)}, {5: 1.0}),
    ],
)
def test_parameters_are_kept_in_pythons_own_types(field: str, value: Any, expected: Any) -> None:
    kept = dataclasses.asdict(SamplingParams(**{field: value}))[field]
    assert kept == expected
    assert type(kept) is type(expected)
    assert repr(kept) == repr(expected)  # that of a NumPy scalar names its type


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (64, 1, "the prompt has 64 tokens, the limit is 63"),
        (40, 61, "40 prompt tokens and max_tokens 61 exceed the model's limit of 100 tokens"),
        (40, 25, "40 prompt tokens and max_tokens 25 need 65 tokens of KV cache, it holds 64"),
    ],
)
def test_requests_that_never_fit_are_refused(prompt: int, max_tokens: int, message: str) -> None:
    with pytest.raises(ContextLengthError, match=message) as refused:
        LIMITS.check(Request(request_id="a", prompt_token_ids=(1,) * prompt, max_tokens=max_tokens))
    assert str(refused.value).startswith("This model's maximum context length is 64 tokens. However, ")


def test_requests_that_just_fit_pass() -> None:
    LIMITS.check(Request(request_id="a", prompt_token_ids=(511,) * 40, max_tokens=24))


@pytest.mark.parametrize("token", [-1, 512])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 512"):
        LIMITS.check(Request(request_id="a", prompt_token_ids=(1, token), max_tokens=1))


def test_no_max_tokens_means_all_that_fits() -> None:
    assert LIMITS.resolve_max_tokens(40, None) == 24
    assert LIMITS.resolve_max_tokens(40, 10) == 10


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        Request(request_id="a", prompt_token_ids=(), max_tokens=1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        LIMITS.resolve_max_tokens(0, None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ParallelConfig(tp=3), "tp must be one of"),
        (lambda: ParallelConfig(tp=4, virtual_devices=2), "virtual_devices 2 is below tp 4"),
        (lambda: CacheConfig(page_size=24), "page_size must be a power of two"),
        (lambda: CacheConfig(host_memory_bytes=-1), "host_memory_bytes must not be negative, got -1"),
        (lambda: CacheConfig(num_pages=0), "num_pages must be at least 1, got 0"),
        (lambda: SchedulerConfig(max_rows=0), "max_rows must be at least 1, got 0"),
        (lambda: SchedulerConfig(max_rows=8, max_step_tokens=4), "max_step_tokens 4 is below max_rows 8"),
        (lambda: SchedulerConfig(depth=9), "depth must be between 1 and 8, got 9"),
        (lambda: EngineConfig(model="x", max_model_len=1), "max_model_len must be at least 2, got 1"),
    ],
)
def test_bad_configurations_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def _model(**changes: int) -> ModelConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "vocab_size": 105,
        "max_position": 64,
    }
    return ModelConfig(architecture="x", rms_norm_eps=1e-5, rope_theta=1e4, **(sizes | changes))


def test_degrees_that_divide_a_model() -> None:
    assert _model().tp_degrees() == (1, 2, 4, 8)
    assert _model(num_heads=9, num_kv_heads=3).tp_degrees() == (1,)
    assert _model(num_heads=14, num_kv_heads=2).tp_degrees() == (1, 2)
    assert _model(intermediate_size=172).tp_degrees() == (1, 2, 4)
    with pytest.raises(ValueError, match=r"tp 8 does not divide.*possible: \[1, 2, 4\]"):
        _model(intermediate_size=172).check_tp(8)


def test_models_that_are_not_there_are_named() -> None:
    with pytest.raises(UnknownModelError, match=r"no model 'nonsense'.*smollm2"):
        find_model("nonsense")


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 0, 7),
        [5, 0, 7],
        (np.int64(5), np.uint8(0), 7),
        np.array([5, 0, 7]),
        np.array([5, 0, 7], np.uint8),
        np.array([5, 1, 0, 1, 7, 1], np.int32)[::2],
        iter((5, 0, 7)),
    ],
)
def test_a_prompt_becomes_a_read_only_array_of_its_own(prompt: Any) -> None:
    array = Request(request_id="a", prompt_token_ids=prompt, max_tokens=1).prompt_token_ids
    assert (array.tolist(), array.dtype, array.ndim) == ([5, 0, 7], np.int32, 1)
    assert array.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    if isinstance(prompt, np.ndarray):
        prompt[0] = 9
    assert array[0] == 5


def test_the_samples_of_one_prompt_share_its_array() -> None:
    first = Request(request_id="a", prompt_token_ids=(5, 0, 7), max_tokens=1)
    second = Request(request_id="b", prompt_token_ids=first.prompt_token_ids, max_tokens=1)
    assert second.prompt_token_ids is first.prompt_token_ids
    assert replace(first, sampling=GREEDY.with_seed(1)).prompt_token_ids is first.prompt_token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((1, 2.0), "must hold integers, got 2.0"),
        ((1, True), "must hold integers, got True"),
        ((1, None), "must hold integers, got None"),
        ((1, "2"), "must hold integers, got '2'"),
        ("12", "must be a sequence of token ids, got '12'"),
        (b"12", "must be a sequence of token ids, got b'12'"),
        (np.array([1.0]), "must hold integers, got an array of float64"),
        (np.array([True]), "must hold integers, got an array of bool"),
        (np.array(["1"]), "must hold integers, got an array of <U1"),
        (np.array([1, 2], object), "must hold integers, got an array of object"),
        (
            np.array([[1, 2]]),
            r"must be a one-dimensional sequence of token ids, got an array of shape \(1, 2\)",
        ),
        (np.array(1), r"must be a one-dimensional sequence of token ids, got an array of shape \(\)"),
        ((1, 2**31), "must hold ids between -2147483648 and 2147483647, got 2147483648"),
        ((1, 10**30), "must hold ids between -2147483648 and 2147483647, got 10{30}"),
        ((1, np.uint64(2**63)), "must hold ids between -2147483648 and 2147483647, got 9223372036854775808"),
        (np.array([1, 2**63], np.uint64), "must hold ids between -2147483648 and 2147483647"),
        (np.array([-(2**40)]), "must hold ids between -2147483648 and 2147483647, got -1099511627776"),
        (np.zeros(0), "the prompt is empty"),
    ],
)
def test_prompts_that_are_no_token_ids_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"request a: the prompt (?:{message})|request a: {message}"):
        Request(request_id="a", prompt_token_ids=prompt, max_tokens=1)


def test_requests_and_rules_are_equal_by_content() -> None:
    rules = LogitRules(allowed_token_ids=(1, 2), bad_words=((3,),))
    request = Request(request_id="a", prompt_token_ids=(1, 2, 3), max_tokens=1, rules=rules)
    again = replace(
        request, prompt_token_ids=[1, 2, 3], rules=LogitRules(allowed_token_ids=[1, 2], bad_words=((3,),))
    )
    assert request == again
    assert hash(request) == hash(again)
    others = [
        replace(request, prompt_token_ids=(1, 2, 4)),
        replace(request, prompt_token_ids=(1, 2)),
        replace(request, sampling=GREEDY.with_seed(1)),
        replace(request, rules=None),
        replace(request, rules=replace(rules, allowed_token_ids=(1, 3))),
        replace(request, rules=replace(rules, presence_penalty=1.0)),
    ]
    assert all(request != other for other in others)
    assert len({request, again, *others}) == 1 + len(others)
    assert request != "a"


@pytest.mark.parametrize(
    "rules",
    [
        LogitRules(allowed_token_ids=(1, 512)),
        LogitRules(logit_bias=((512, 1.0),)),
        LogitRules(bad_words=((1,), (2, 512))),
    ],
)
def test_rules_that_name_ids_outside_the_vocabulary_are_refused(rules: LogitRules) -> None:
    with pytest.raises(ValueError, match="token id 512 is outside the vocabulary of 512"):
        LIMITS.check(Request(request_id="a", prompt_token_ids=(1,), max_tokens=1, rules=rules))
    with pytest.raises(ValueError, match="token id -7 is outside"):
        LIMITS.check(Request(request_id="a", prompt_token_ids=(1,), max_tokens=1, stop_ids=(-7,)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LogitRules(allowed_token_ids=(2**31,)),
        lambda: LogitRules(logit_bias=((2**31, 1.0),)),
        lambda: LogitRules(bad_words=((2**31,),)),
    ],
)
def test_rules_that_name_ids_beyond_int32_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"must hold ids between .* got 2147483648"):
        build()
