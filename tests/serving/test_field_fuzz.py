"""Whatever a field of a body holds is refused at the door, or packs for the device without a warning.

Every field of every body is given each of the values below, so that a field that is added is tried as well;
and each is given a value that passes the door, or it would not be tried at all.
"""

import asyncio
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.engine.constraint_compiler import ConstraintCompiler
from albireo_jax.engine.request_writer import RequestWriter
from albireo_jax.runtime.batch import pack_params
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape, pack_rules
from albireo_jax.sched.constraints import ConstrainedAnswer
from albireo_jax.sched.sequence import Sequence
from albireo_jax.serving.api_errors import ApiError
from albireo_jax.serving.chat_requests import parse_chat, render_chat
from albireo_jax.serving.request_body import parse_body
from albireo_jax.serving.schemas.chat_bodies import ChatBody, TokenizeBody
from albireo_jax.serving.schemas.completion_bodies import CompletionBody, DetokenizeBody
from albireo_jax.serving.schemas.strict_model import StrictModel
from albireo_jax.text.answers.answer_formats import ToolFormat, answer_format
from albireo_jax.text.grammar.compiler import GrammarCompiler
from albireo_jax.text.tokenizer import Tokenizer
from tests.labs.engine_lab import CHAT_TEMPLATE, LIMITS
from tests.labs.script_lab import script_tokenizer

NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31) - 1, -(2**63)]
FLOATS = [
    0.0,
    -0.0,
    1e-46,
    -1e-46,
    1e-45,
    1e-38,
    1.2e-38,
    1e-6,
    0.5,
    1.0,
    2.0,
    100.0,
    1e38,
    1e39,
    1e308,
    -2.0,
]
TEXTS = [
    "",
    "x",
    " ",
    "\0",
    "é" * 3,
    "\U0001f642",
    "x" * 5000,
    "\ud800",
    "1",
    "stop",
    "a\udfff",
    "<|im_end|>",
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VALUES: list[Any] = [
    None,
    True,
    False,
    *NUMBERS,
    *FLOATS,
    *TEXTS,
    [],
    {},
    [[]],
    [{}],
    *([number] for number in (*NUMBERS, *FLOATS)),
    *([text] for text in TEXTS),
    *([[number]] for number in NUMBERS),
    [1] * 33,
    list(range(104)),
    [1] * (LIMITS.max_model_len - 1),
    [1] * LIMITS.max_model_len,
    ["x"] * 33,
    [f"{i}" for i in range(33)],
    *({str(number): bias} for number in NUMBERS for bias in (1e-46, 100, -100, 1e39)),
    {str(i): 0.5 for i in range(104)},
    {"x": 1.0},
    {"1": "x"},
    {"type": "json_object"},
    {"include_usage": True},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "hi"}]
SPECIAL: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": text}] for text in TEXTS],
    "tools": [[TOOL], [TOOL] * 200],
    "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
    "response_format": [{"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}],
    "structured_outputs": [{"regex": "a+"}, {"json": SCHEMA}, {"choice": ["a", "\ud800"]}],
    "guided_json": [SCHEMA],
    "guided_regex": ["[ab]{3}", "\ud800+"],
    "guided_choice": [["a", "b"]],
    "guided_grammar": ['start: "a" | "\ud800"', 'start: "a"'],
    "reasoning_effort": ["low", "high"],
    "model": ["tiny"],
    "truncation_side": ["left", "right"],
}
BESIDE: dict[str, dict[str, Any]] = {  # what a field needs beside it to be taken
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "best_of": {"n": 1},
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
}
BASE: dict[type[StrictModel], dict[str, Any]] = {
    CompletionBody: {"prompt": "hi"},
    ChatBody: {"messages": HELLO},
    TokenizeBody: {"prompt": "hi"},
    DetokenizeBody: {"tokens": [1]},
}
_OF_CONVERSATIONS = set(TokenizeBody.model_fields) & set(ChatBody.model_fields) - {"model"}
SHAPE = LogitRulesShape(num_slots=9, padded_vocab=LIMITS.vocab_size, max_len=LIMITS.max_sequence_len)


class _Boundary:
    """Takes a body from its bytes to the buffers that a device is given."""

    def __init__(self, tokenizer: Tokenizer, limits: EngineLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._format = answer_format(CHAT_TEMPLATE, tools=ToolFormat.HERMES)
        compiler = GrammarCompiler(
            tokenizer, vocab_size=limits.vocab_size, eos_token_ids=tokenizer.eos_token_ids
        )
        self._constraints = ConstraintCompiler(compiler)
        self._writer = RequestWriter(
            tokenizer,
            limits,
            eos_token_ids=tokenizer.eos_token_ids,
            clock=time.perf_counter,
            compile_first=self._constraints.first_mask,
        )

    def take(self, schema: type[StrictModel], body: dict[str, Any]) -> list[Sequence]:
        """The sequences that `body` adds to the waiting queue. Raises the error of a body that is refused."""
        match parse_body(json.dumps(body).encode(), schema):
            case CompletionBody() as completion:
                params = completion.sampling_params(16)
                prompts = [
                    tuple(prompt) if not isinstance(prompt, str) else tuple(self._tokenizer.encode(prompt))
                    for prompt in completion.prompts()
                ]
            case ChatBody() as chat:
                asked = asyncio.run(parse_chat(self._tokenizer, self._format, chat))
                params, prompts = asked.params, [asked.prompt_ids]
            case TokenizeBody() as tokenize:
                text = tokenize.prompt
                if text is None:
                    text = asyncio.run(render_chat(self._tokenizer, self._format, tokenize))
                params, prompts = SamplingParams(), [tuple(self._tokenizer.encode(text))]
            case DetokenizeBody() as detokenize:
                text = self._tokenizer.decode(detokenize.tokens)
                params, prompts = SamplingParams(), [tuple(self._tokenizer.encode(f"x{text}"))]
            case other:
                raise AssertionError(f"no way through the door is known for {type(other)}")
        requests = [request for ids in prompts for request in self._writer.write(ids, params)[:2]]
        for request in requests:
            self._limits.check(request)
        return [self._sequence(request) for request in requests]

    def _sequence(self, request: Request) -> Sequence:
        """A sequence with its first mask, if it is constrained."""
        sequence = Sequence(request=request, known_ids=request.prompt_token_ids)
        if (constraint := self._constraints.constraint(request)) is not None:
            sequence.answer = ConstrainedAnswer(request, constraint.result())
            sequence.answer.update_mask(len(request.prompt_token_ids))
        return sequence


def _pack(sequence: Sequence) -> None:
    """Do the engine thread's part of adding a sequence: its parameters and its rules."""
    params = sequence.slot_params(0, ())
    pack_params([params], padding_slot=8)
    if params.rules is not None:
        pack_rules(0, params.rules, SHAPE)


def _values(field: str) -> Iterator[Any]:
    yield from VALUES
    yield from SPECIAL.get(field, ())


FIELDS = [(schema, field) for schema in BASE for field in sorted(schema.model_fields)]


@pytest.fixture(scope="module")
def boundary() -> _Boundary:
    tokenizer = script_tokenizer(CHAT_TEMPLATE + "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}")
    return _Boundary(tokenizer, dataclasses.replace(LIMITS, vocab_size=tokenizer.vocab_size))


@pytest.mark.parametrize(("schema", "field"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_extreme_values_are_refused_or_packed(
    boundary: _Boundary, schema: type[StrictModel], field: str
) -> None:
    taken = 0
    for value in _values(field):
        body = BASE[schema] | BESIDE.get(field, {}) | {field: value}
        if schema is TokenizeBody and field in _OF_CONVERSATIONS:
            del body["prompt"]
            body.setdefault("messages", HELLO)
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            try:
                sequences = boundary.take(schema, body)
            except (ApiError, ValueError):
                continue
            for sequence in sequences:
                _pack(sequence)
        taken += value is not None
    assert taken, f"no value passes for {field}: list one in SPECIAL, or what it needs in BESIDE"


@pytest.mark.parametrize("value", [0.0, 1e-46, 1e-45, 1e-38, -1e-46, 1e-30])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"])
def test_a_number_too_small_for_the_device_is_refused_or_becomes_one_that_it_holds(
    field: str, value: float
) -> None:
    if value < 0 and not field.endswith("penalty"):
        with pytest.raises(ValueError, match=f"{field} must be in"):
            SamplingParams(**{field: value})
        return
    kept = dataclasses.asdict(SamplingParams(**{field: value}))[field]
    with np.errstate(all="raise"):
        held = np.float32(kept)
    assert held == 0 or abs(held) >= np.finfo(np.float32).tiny
