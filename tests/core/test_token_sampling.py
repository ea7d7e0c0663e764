"""The record of how a token is chosen, and what is made of its fields."""

import struct
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.core.token_sampling import (
    GREEDY,
    MAX_SEED,
    NUM_WORDS,
    PARAMETERS,
    TokenSampling,
    WordKind,
)
from albireo_jax.core.types import Request, SamplingParams

CHOSEN = TokenSampling(temperature=0.5, top_k=7, top_p=0.9, min_p=0.25, seed=(3 << 32) + 2**32 - 1)


@given(
    temperature=st.floats(2**-16, 100, width=32),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(2**-100, 1, width=32),
    min_p=st.floats(0, 1, width=32, allow_subnormal=False),
    seed=st.integers(0, MAX_SEED),
)
def test_words_hold_every_parameter_in_the_order_of_the_fields(**given: float) -> None:
    words = TokenSampling(**given).words()  # type: ignore[arg-type]
    assert (words.shape, words.dtype) == ((NUM_WORDS,), np.int32)
    *values, high, low = struct.unpack("=fiffII", words.tobytes())
    assert values == [given[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    assert (high << 32) + low == given["seed"]


def test_every_field_says_what_others_make_of_it() -> None:
    assert [each.name for each in fields(TokenSampling)] == list(PARAMETERS)
    assert sum(parameter.kind.num_words for parameter in PARAMETERS.values()) == NUM_WORDS
    assert PARAMETERS["seed"].kind is WordKind.INT64
    assert CHOSEN.by_name() == {name: getattr(CHOSEN, name) for name in PARAMETERS}


def test_rows_filter_if_a_parameter_can_rule_out_tokens() -> None:
    assert not TokenSampling(temperature=0.3, seed=5).is_filtered
    for name, parameter in PARAMETERS.items():
        assert replace(TokenSampling(), **{name: CHOSEN.by_name()[name]}).is_filtered == parameter.is_filter
    assert GREEDY.is_greedy
    assert TokenSampling(top_p=0.0).is_greedy
    assert not TokenSampling(temperature=1e-5).is_greedy


def test_choices_are_taken_out_of_a_callers_parameters() -> None:
    params = SamplingParams(**CHOSEN.by_name(), max_tokens=3, stop=("x",), logit_bias={1: 2.0})
    assert params.with_seed(9) == replace(CHOSEN, seed=9)
    assert type(params.with_seed(9)) is TokenSampling
    assert hash(params.with_seed(9)) == hash(replace(CHOSEN, seed=9))
    assert replace(params, top_k=8).with_seed(0) == replace(CHOSEN, top_k=8, seed=0)


def test_a_request_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="request a: its sampling has no seed"):
        Request(request_id="a", prompt_token_ids=(1,), max_tokens=1, sampling=TokenSampling())
    assert Request(request_id="a", prompt_token_ids=(1,), max_tokens=1).sampling == GREEDY
