"""Log probabilities through the whole engine: those of a dense model, however the tokens are computed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.plan import LogprobArrays
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request, RequestOutput

Build = Callable[..., Any]
VOCAB, LONGEST, TOP = 105, 192, 5


def requests() -> list[Request]:
    """Some with scores and some without, some with rules; prompts of one token and of several chunks."""
    draw = np.random.default_rng(8)
    lengths = [1, 2, 3, 40, 110, 7, 64, 70, 12, 5, 90, 30]
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(draw.integers(0, VOCAB, length).tolist()),
            max_tokens=int(draw.integers(1, 20)),
            sampling=TokenSampling(temperature=0.9 * (index % 2), seed=index),
            logprobs=None if index % 4 == 3 else index % 4,
            prompt_logprobs=None if index % 3 == 2 else TOP,
            rules=LogitRules(repetition_penalty=2.0, logit_bias=((3, 9.0),)) if index % 5 == 0 else None,
        )
        for index, length in enumerate(lengths)
    ]


REQUESTS = requests()


def run(small: Any, wanted: Sequence[Request]) -> dict[str, list[RequestOutput]]:
    """The outputs of each request."""
    for request in wanted:
        small.loop.scheduler.add(request)
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in wanted}
    for _ in range(2000):
        if not small.loop.has_work:
            break
        for output in small.loop.step():
            outputs[output.request_id].append(output)
    assert not small.loop.has_work
    return outputs


def dense_logits(engine: Build, token_ids: Sequence[int]) -> np.ndarray:
    text = np.zeros(LONGEST, np.int32)
    text[: len(token_ids)] = token_ids
    return np.asarray(engine(tp=1, max_logprobs=TOP).model(jnp.asarray(text)), np.float64)


def joined(pieces: Sequence[LogprobArrays]) -> LogprobArrays:
    names = ("logprobs", "ranks", "top_ids", "top_logprobs")
    return LogprobArrays(
        **{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names}
    )


def check(pieces: Sequence[LogprobArrays], logits_TV: np.ndarray, next_ids: Sequence[int]) -> int:
    """The scores of `next_ids` are those of the logits, up to rounding.

    Ranks are exact where no other token is as near; gives how many of these there are.
    """
    scores = joined(pieces)
    logprobs = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    expected = np.take_along_axis(logprobs, np.array(next_ids)[:, None], axis=1)
    np.testing.assert_allclose(scores.logprobs, expected[:, 0], atol=2e-4)
    distinct = (np.abs(logprobs - expected) < 1e-3).sum(axis=1) == 1
    ranks = 1 + (logprobs > expected).sum(axis=1)
    assert (scores.ranks[distinct] == ranks[distinct]).all()
    top = -np.sort(-logprobs, axis=1)[:, :TOP]
    np.testing.assert_allclose(scores.top_logprobs, top, atol=2e-4)
    of_top_ids = np.take_along_axis(logprobs, scores.top_ids, axis=1)
    np.testing.assert_allclose(of_top_ids, top, atol=2e-4)
    return int(distinct.sum())


@pytest.fixture(scope="module")
def outputs(engine: Build) -> dict[str, list[RequestOutput]]:
    return run(engine(tp=1, max_logprobs=TOP), REQUESTS)


def test_scores_are_those_of_the_dense_model(engine: Build, outputs: dict[str, list[RequestOutput]]) -> None:
    """Of the logits before rules and temperature, at every position of prompt and answer."""
    ranked = 0
    for request in REQUESTS:
        mine, prompt = outputs[request.request_id], request.prompt_token_ids.tolist()
        answer = [output.token_id for output in mine]
        if request.logprobs is None and request.prompt_logprobs is None:
            assert all(output.scores is None for output in mine)
            continue
        logits_TV = dense_logits(engine, [*prompt, *answer])
        pieces = mine[0].scores.prompt
        assert all(output.scores.prompt is None for output in mine[1:])
        begin = len(prompt) - 1
        ranked += check([output.scores.token for output in mine], logits_TV[begin:][: len(mine)], answer)
        if request.prompt_logprobs is None or begin == 0:
            assert pieces == ()
        else:
            ranked += check(pieces, logits_TV[:begin], prompt[1:])
    assert ranked > 200


@pytest.mark.parametrize("shape", [{"tp": 1, "depth": 1}, {"tp": 4, "num_pages": 40}])
def test_scores_do_not_depend_on_how_tokens_are_computed(
    engine: Build, outputs: dict[str, list[RequestOutput]], shape: dict[str, int]
) -> None:
    small = engine(**shape, max_logprobs=TOP)
    others = run(small, REQUESTS)
    assert (small.loop.scheduler.stats().preemptions > 0) == ("num_pages" in shape)
    for request_id, mine in outputs.items():
        theirs = others[request_id]
        assert [output.token_id for output in mine] == [output.token_id for output in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert (one.scores is None) == (other.scores is None)
            if one.scores is not None:
                assert_close([one.scores.token], [other.scores.token])
                assert (one.scores.prompt is None) == (other.scores.prompt is None)
                assert_close(one.scores.prompt or (), other.scores.prompt or ())


def assert_close(some: Sequence[LogprobArrays], others: Sequence[LogprobArrays]) -> None:
    """The same scores, in whatever pieces."""
    assert bool(some) == bool(others)
    if some:
        one, other = joined(some), joined(others)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
        np.testing.assert_allclose(one.top_logprobs, other.top_logprobs, atol=2e-4)


def test_scores_change_no_token(engine: Build, outputs: dict[str, list[RequestOutput]]) -> None:
    plain = [replace(request, logprobs=None, prompt_logprobs=None) for request in REQUESTS]
    tokens = engine(tp=1, max_logprobs=TOP).run(plain)
    assert tokens == {name: [output.token_id for output in mine] for name, mine in outputs.items()}


@pytest.mark.parametrize(
    ("max_logprobs", "wanted", "message"),
    [
        (0, {"logprobs": 0}, "logprobs 0: log probabilities are turned off in this engine"),
        (5, {"prompt_logprobs": 6}, "prompt_logprobs 6 exceeds the limit of 5"),
    ],
)
def test_what_an_engine_does_not_give_is_refused(
    max_logprobs: int, wanted: dict[str, int], message: str
) -> None:
    limits = EngineLimits(
        max_model_len=64, vocab_size=VOCAB, num_pages=64, page_size=4, max_logprobs=max_logprobs
    )
    request = Request(request_id="r", prompt_token_ids=(1,), max_tokens=2)
    limits.check(request)
    with pytest.raises(ValueError, match=message):
        limits.check(replace(request, **wanted))
