"""Structured output from a real model through the whole engine: answers fit, and disturb no others."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from albireo_jax.core.types import FinishReason, SamplingParams, StructuredOutput, StructureKind
from albireo_jax.launch import Engine
from tests.labs.grammar_lab import draw_schema
from tests.labs.model_lab import stories

FREE = [SamplingParams(max_tokens=200, temperature=0.8, top_p=0.9, seed=seed) for seed in range(12)]


@pytest.fixture(scope="module")
def engine(data_dir: Path) -> Iterator[Engine]:
    with stories(data_dir, max_rows=16, max_step_tokens=64) as running:
        yield running


@pytest.mark.parametrize(("num_schemas", "least"), [(40, 12), pytest.param(480, 200, marks=pytest.mark.slow)])
def test_every_answer_fits_its_schema_and_free_rows_are_as_alone(
    engine: Engine, num_schemas: int, least: int
) -> None:
    random = np.random.default_rng(0)
    schemas = [draw_schema(random, depth=2) for _ in range(num_schemas)]
    constrained = [
        SamplingParams(
            max_tokens=160,
            temperature=0.7,
            seed=seed,
            structured=StructuredOutput(kind=StructureKind.JSON_SCHEMA, text=json.dumps(schema)),
        )
        for seed, schema in enumerate(schemas)
    ]
    alone = engine.frontend.generate(["Once upon a time"] * len(FREE), FREE)
    done = engine.frontend.generate(
        ["Once upon a time"] * len(FREE) + ["Tom has"] * num_schemas, [*FREE, *constrained]
    )
    assert [one.token_ids for one in done[: len(FREE)]] == [one.token_ids for one in alone]
    ended = 0
    for answer, schema in zip(done[len(FREE) :], schemas, strict=True):
        if answer.finish_reason is FinishReason.LENGTH:
            continue  # a number, a list or the names in an object may go on for ever
        assert answer.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), schema)
        ended += 1
    assert ended >= least, f"{ended} of {num_schemas}"
