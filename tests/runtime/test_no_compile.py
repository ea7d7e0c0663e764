"""Once an engine is up, nothing is compiled any more, whatever requests come."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request

_SCALE = 24
"""Divides the trace's lengths, so that its longest prompts fit the small model."""


def _trace(path: Path) -> list[Request]:
    draw = random.Random(0)
    with path.open() as file:
        rows = list(csv.DictReader(file))[:300]
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(
                draw.randrange(105) for _ in range(max(1, min(150, int(row["input_tokens"]) // _SCALE)))
            ),
            max_tokens=max(1, min(40, int(row["output_tokens"]) // _SCALE)),
            sampling=TokenSampling(
                temperature=draw.choice([0.0, 0.7, 1.3]),
                top_k=draw.choice([0, 0, 5, 40]),
                top_p=draw.choice([1.0, 0.9, 0.3]),
                min_p=draw.choice([0.0, 0.1]),
                seed=index,
            ),
            min_tokens=draw.choice([0, 1]),
            stop_ids=draw.choice([(), (3,), (1, 2, 3)]),
        )
        for index, row in enumerate(rows)
    ]


def test_three_hundred_mixed_requests_compile_nothing(
    engine: Callable[..., Any], data_dir: Path, compilations: list[str]
) -> None:
    small = engine(tp=2, max_rows=32, max_step_tokens=128, num_pages=600, all_buckets=True)
    small.run(_trace(data_dir / "traces" / "azure_conv_2023_first300.csv")[:4])
    compilations.clear()
    tokens = small.run(_trace(data_dir / "traces" / "azure_conv_2023_first300.csv"))
    assert len(tokens) == 300
    assert all(tokens.values())
    assert len(compilations) == 0


def test_a_compilation_would_be_counted(compilations: list[str]) -> None:
    jax.jit(lambda x: x * 3 + 1)(jnp.zeros(17))
    assert compilations
