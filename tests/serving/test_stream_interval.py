"""Events of a stream bring as many tokens as asked for, and all that waited for a client that was slow."""

import json
from typing import Any

import httpx
import pytest

from albireo_jax.core.types import FinishReason
from albireo_jax.engine.choices import ChoiceDelta, merge_deltas
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import lab
from tests.labs.http_lab import served

BODY: dict[str, Any] = {
    "prompt": "hello",
    "max_tokens": 40,
    "seed": 3,
    "ignore_eos": True,
    "n": 2,
    "return_token_ids": True,
}


@pytest.mark.parametrize("interval", [1, 7, 100])
def test_events_bring_the_tokens_of_the_whole_answer_in_few_parts(interval: int) -> None:
    with lab() as engine, served(create_app(engine, stream_interval=interval)) as url:
        whole = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()["choices"]
        text = httpx.post(f"{url}/v1/completions", json=BODY | {"stream": True}, timeout=60).text
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    for index in range(2):
        parts = [choice for choice in choices if choice["index"] == index]
        assert "".join(part["text"] for part in parts) == whole[index]["text"]
        ids = [part["token_ids"] for part in parts]
        assert [token_id for part in ids for token_id in part] == whole[index]["token_ids"]
        assert len(ids) <= 2 + 40 // interval


def test_deltas_of_a_choice_are_put_together_in_their_order() -> None:
    deltas = [
        ChoiceDelta(0, "a", (1,), None, None, cached_tokens=5),
        ChoiceDelta(1, "x", (7,), None, None),
        ChoiceDelta(0, "b", (2, 3), None, None),
        ChoiceDelta(0, "", (4,), FinishReason.STOP, 4),
    ]
    assert merge_deltas(deltas) == [
        ChoiceDelta(0, "ab", (1, 2, 3, 4), FinishReason.STOP, 4, cached_tokens=5),
        ChoiceDelta(1, "x", (7,), None, None),
    ]
    assert merge_deltas(deltas[:2]) == deltas[:2]
    failed = ChoiceDelta(0, "", (), FinishReason.ERROR, None)
    assert merge_deltas([deltas[0], failed, deltas[1]]) == [*deltas[:2], failed]
