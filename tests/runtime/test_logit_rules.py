"""Requests with rules through the whole engine: what a dense model and a plain loop say, in any company."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.plan import Int32s
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.core.types import Request

Build = Callable[..., Any]
VOCAB = 105
RULES = [
    LogitRules(repetition_penalty=1.7),
    LogitRules(presence_penalty=1.5, frequency_penalty=0.4),
    LogitRules(logit_bias=((3, 4.0), (90, -100.0), (41, 2.5))),
    LogitRules(allowed_token_ids=tuple(range(5, 60, 3)), frequency_penalty=2.0),
    LogitRules(repetition_penalty=0.8, frequency_penalty=-0.3, presence_penalty=0.2, logit_bias=((7, 1.0),)),
]


class Rising:
    """A constraint by hand: after token i only i + 1 … i + 20 may come, around the vocabulary."""

    def __init__(self) -> None:
        self.last = 0

    def mask(self) -> Int32s:
        bits = np.zeros(128, np.bool_)
        bits[[(self.last + step) % VOCAB for step in range(1, 21)]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def advance(self, token_id: int) -> None:
        self.last = token_id


def _requests(sampling: TokenSampling = GREEDY) -> list[Request]:
    draw = np.random.default_rng(3)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(int(token) for token in draw.integers(0, VOCAB, draw.integers(1, 50))),
            max_tokens=int(draw.integers(8, 24)),
            sampling=sampling.with_seed(index),
            rules=(RULES[index // 2 % len(RULES)] if index % 2 else None),
        )
        for index in range(14)
    ]


SAMPLED = _requests(TokenSampling(temperature=0.9, top_p=0.95))


@pytest.fixture(scope="module")
def alone(engine: Build) -> dict[str, list[int]]:
    """Tokens of each request in an engine by itself."""
    small = engine(tp=1, depth=1)
    return {request.request_id: small.run([request])[request.request_id] for request in SAMPLED}


def _changed(logits_V: np.ndarray, rules: LogitRules, prompt: list[int], answer: list[int]) -> np.ndarray:
    """A row of logits with the rules applied, by a loop."""
    out = logits_V.astype(np.float32).copy()
    allowed = rules.allowed_token_ids.tolist() or range(VOCAB)
    out[[token for token in range(VOCAB) if token not in allowed]] = -np.inf
    for token, bias in rules.logit_bias:
        out[token] += np.float32(bias)
    for token in {*prompt, *answer}:
        factor = np.float32(rules.repetition_penalty)
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in set(answer):
        out[token] -= np.float32(rules.frequency_penalty) * answer.count(token)
        out[token] -= np.float32(rules.presence_penalty)
    return out


def test_greedy_tokens_are_those_of_a_loop_over_the_dense_model(engine: Build) -> None:
    requests = _requests()
    for request, tokens in zip(requests, engine(tp=1).run(requests).values(), strict=True):
        prompt = request.prompt_token_ids.tolist()
        text = np.zeros(192, np.int32)
        text[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits_TV = np.asarray(engine(tp=1).model(jnp.asarray(text)))
        for index, token in enumerate(tokens):
            logits_V = logits_TV[len(prompt) - 1 + index]
            changed = _changed(logits_V, request.rules or LogitRules(), prompt, tokens[:index])
            assert token == changed.argmax()


def test_rules_change_what_is_sampled(engine: Build, alone: dict[str, list[int]]) -> None:
    without = engine(tp=1).run([replace(request, rules=None) for request in SAMPLED])
    same = [request for request in SAMPLED if without[request.request_id] == alone[request.request_id]]
    assert [request for request in SAMPLED if request.rules is None] == [
        request for request in same if request.rules is None
    ]
    assert len(same) <= len(SAMPLED) / 2 + 2


@pytest.mark.parametrize(("tp", "depth"), [(1, 2), (4, 1), (8, 2)])
def test_tokens_do_not_depend_on_how_they_are_computed(
    engine: Build, alone: dict[str, list[int]], tp: int, depth: int
) -> None:
    assert engine(tp=tp, depth=depth).run(SAMPLED) == alone


def test_tokens_survive_preemption(engine: Build, alone: dict[str, list[int]]) -> None:
    small = engine(tp=2, depth=2, num_pages=32)
    assert small.run(SAMPLED) == alone
    assert small.loop.scheduler.stats().preemptions > 0


def test_bad_words_never_appear(engine: Build) -> None:
    small = engine(tp=4)
    request = Request(
        request_id="r",
        prompt_token_ids=(4, 5),
        max_tokens=60,
        sampling=TokenSampling(temperature=1.5, seed=1),
    )
    free = small.run([request])["r"]
    words = ((free[0],), (free[3], free[4]), (free[10], free[11], free[12]))
    held = small.run([replace(request, rules=LogitRules(bad_words=words))])["r"]
    assert held != free
    for word in words:
        assert all(tuple(held[at : at + len(word)]) != word for at in range(len(held)))


@pytest.mark.parametrize(("tp", "depth"), [(1, 2), (4, 2)])
def test_constrained_rows_follow_their_masks_and_disturb_nobody(
    engine: Build, alone: dict[str, list[int]], tp: int, depth: int
) -> None:
    constrained = [
        Request(
            request_id=f"c{index}",
            prompt_token_ids=(9,) * (index + 1),
            max_tokens=20,
            sampling=TokenSampling(temperature=1.0, seed=index),
        )
        for index in range(11)
    ]
    tokens = engine(tp=tp, depth=depth, max_rows=32, max_step_tokens=64).run(
        [*SAMPLED, *constrained], constraints={request.request_id: Rising() for request in constrained}
    )
    assert {name: ids for name, ids in tokens.items() if name in alone} == alone
    for request in constrained:
        ids = tokens[request.request_id]
        assert len(ids) == 20
        assert all(1 <= (after - before) % VOCAB <= 20 for before, after in zip([0, *ids], ids, strict=False))
