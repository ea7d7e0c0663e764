"""A step's outputs go to the readers of their requests, and to nobody else."""

import pytest

from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.output_readers import QueueReader
from tests.labs.service_lab import Build

FOREVER = SamplingParams(max_tokens=1500, ignore_eos=True, seed=3)


def test_a_paused_reader_holds_its_own_outputs_only(lab: Build) -> None:
    with lab() as engine:
        paused = engine.frontend.stream(["hello"], SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
        seen = list(next(paused))
        for seed in range(5):
            engine.frontend.generate(["abc"] * 16, SamplingParams(max_tokens=50, seed=seed))
            with engine.frontend.stream(["left"] * 4, FOREVER) as left:
                next(left)
        (reader,) = engine.frontend._readers
        assert isinstance(reader, QueueReader)
        assert reader._queue.qsize() <= 8
        seen += [delta for deltas in paused for delta in deltas]
        assert sum(len(delta.token_ids) for delta in seen) == 8
        assert engine.service.drain(60)
        assert engine.frontend.num_readers == 0
        assert not engine.frontend._routes


def test_a_reader_that_cannot_take_outputs_fails_alone(lab: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    with lab() as engine:
        broken = engine.frontend.stream(["x"], FOREVER)

        def refuse(*_: object) -> None:
            raise MemoryError("no room for another output")

        (reader,) = engine.frontend._readers
        monkeypatch.setattr(reader, "post", refuse)
        (whole,) = engine.frontend.generate(["x"], params)
        assert len(whole.token_ids) == params.max_tokens
        broken.close()
        assert engine.service.drain(60)
        assert engine.frontend.num_readers == 0
