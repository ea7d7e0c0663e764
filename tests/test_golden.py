"""Greedy tokens of real models against those that transformers computed in float32."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.core.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.launch import Engine, launch
from albireo_jax.sched.scheduler import Scheduler


@dataclass(frozen=True)
class Case:
    """A model, the golden file of its answers, and a tensor-parallel degree."""

    model: str
    golden: str
    tp: int = 1


CASES = [
    Case("stories260k", "stories260k.json"),
    Case("stories260k", "stories260k.json", tp=2),
    Case("stories260k", "stories260k.json", tp=4),
    Case("babyllama105", "babyllama105.json"),
    Case("smollm2", "smollm2-135m-instruct-q4_1.json"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.model}-tp{case.tp}")
def launched(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[tuple[Engine, list[dict[str, Any]]]]:
    """An engine, and the golden answers of its model."""
    case: Case = request.param
    folder = data_dir / "models" / case.model
    config = EngineConfig(
        model=str(folder) if folder.is_dir() else case.model,
        max_model_len=200,
        parallel=ParallelConfig(tp=case.tp),
        cache=CacheConfig(page_size=16, num_pages=64),
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=32),
    )
    engine = launch(config)
    yield engine, json.loads((data_dir / "golden" / case.golden).read_text())["greedy"]
    engine.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_greedy_tokens_equal_the_golden_ones(
    launched: tuple[Engine, list[dict[str, Any]]], depth: int
) -> None:
    engine, golden = launched
    loop = EngineLoop(
        Scheduler(engine.config.scheduler, engine.limits), engine.executor, depth=depth, timeline=Timeline()
    )
    for index, answer in enumerate(golden):
        loop.scheduler.add(
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(answer["input_ids"]),
                max_tokens=len(answer["output_ids"]),
            )
        )
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(golden))}
    for _ in range(2000):
        for output in loop.step():
            assert output.token_id is not None
            tokens[output.request_id].append(output.token_id)
    assert not loop.has_work
    assert list(tokens.values()) == [answer["output_ids"] for answer in golden]


def test_the_tokenizer_gives_the_golden_prompts(launched: tuple[Engine, list[dict[str, Any]]]) -> None:
    engine, golden = launched
    for answer in golden:
        prompt = answer["prompt"]
        if engine.tokenizer.has_chat_template:
            token_ids = engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        else:
            token_ids = engine.tokenizer.encode(prompt)
        assert token_ids == answer["input_ids"]
