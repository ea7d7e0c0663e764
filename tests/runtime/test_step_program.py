"""What the compiled step contains: its collectives, a cache written in place, rows split over ranks."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from albireo_jax.core.config import SamplingMode
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.step import LayerLoop
from albireo_jax.sampling.routes import Route

Build = Callable[..., Any]
DECODE = Bucket(8, 8)
MIXED = Bucket(64, 8)
ALL_TO_ALL = Route.ALL_TO_ALL
LAYERS = 3
VOCABULARY = 105


def _instructions(text: str, name: str) -> list[str]:
    """Result types of all HLO instructions of one kind."""
    return re.findall(rf"= (\S+(?: \S+)*?) {name}(?:-start)?\(", text)


def _collectives(text: str) -> Counter[str]:
    names = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    return Counter({name: count for name in names if (count := len(_instructions(text, name)))})


@pytest.mark.parametrize("bucket", [DECODE, MIXED])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_collectives_of_the_unrolled_forward_pass(engine: Build, tp: int, bucket: Bucket) -> None:
    text = engine(tp=tp, layers=LayerLoop.UNROLLED).executor.compiled(bucket).as_text()
    embedding = 1
    assert _collectives(text) == {"all-reduce": 2 * LAYERS + embedding}


@pytest.mark.parametrize("tp", [2, 8])
def test_collectives_of_the_scanned_forward_pass(engine: Build, tp: int) -> None:
    text = engine(tp=tp).executor.compiled(DECODE).as_text()
    embedding = 1
    assert _collectives(text) == {"all-reduce": 2 + embedding}


def test_one_device_communicates_with_nobody(engine: Build) -> None:
    executor = engine(tp=1).executor
    for name in (DECODE, *(Sampling(8, route) for route in (Route.GREEDY, Route.UNFILTERED, ALL_TO_ALL))):
        assert not _collectives(executor.compiled(name).as_text())


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_the_all_to_all_trades_vocabulary_shards_for_row_shards(engine: Build, tp: int) -> None:
    text = engine(tp=tp).executor.compiled(Sampling(8, ALL_TO_ALL)).as_text()
    assert _collectives(text) == {"all-to-all": 1, "all-gather": 1}
    (gathered,) = _instructions(text, "all-gather")
    assert gathered.startswith("s32[8]")
    (exchanged,) = _instructions(text, "all-to-all")
    rows, share = 8 // tp, -(-VOCABULARY // tp)
    elements = [
        int(a) * int(b) * int(c or 1) for a, b, c in re.findall(r"f32\[(\d+),(\d+),?(\d+)?\]", exchanged)
    ]
    assert sum(elements) == rows * share * tp
    # What is sampled on a rank: rows / t rows of the whole vocabulary, never all rows of it.
    assert f"f32[{rows},{share * tp}]" in text
    assert f"f32[8,{share * tp}]" not in text


@pytest.mark.parametrize(("route", "numbers"), [(Route.GREEDY, 2), (Route.UNFILTERED, 3)])
def test_rows_that_filter_nothing_move_a_few_numbers_each(engine: Build, route: Route, numbers: int) -> None:
    text = engine(tp=4).executor.compiled(Sampling(8, route)).as_text()
    collectives = _collectives(text)
    assert set(collectives) == {"all-reduce"}
    shapes = [
        shape for each in _instructions(text, "all-reduce") for shape in re.findall(r"\w+\[(\d+)\]", each)
    ]
    assert shapes.count("8") == len(shapes) == numbers


def test_replicated_sampling_gathers_the_logits(engine: Build) -> None:
    small = engine(tp=4, sampling=SamplingMode.REPLICATED)
    text = small.executor.compiled(Sampling(8, Route.REPLICATED)).as_text()
    assert _collectives(text) == {"all-gather": 1}
    assert "f32[8,108]" in text


@pytest.mark.parametrize("layers", list(LayerLoop))
@pytest.mark.parametrize("tp", [1, 4])
def test_the_cache_is_aliased_and_never_copied(engine: Build, tp: int, layers: LayerLoop) -> None:
    small = engine(tp=tp, layers=layers, num_pages=16000)
    pool_bytes = 2 * LAYERS * 16001 * 4 * 8 * 8 * 4 // tp
    for bucket in (DECODE, MIXED):
        memory = small.executor.compiled(bucket).memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 4
