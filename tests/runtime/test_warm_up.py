"""Every program is run once before the first step, which changes no token, and none is compiled after it."""

from collections import Counter
from typing import Any

import jax
import pytest

from albireo_jax.core.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from albireo_jax.core.gpu_options import GpuConfig, LayerForm
from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.runtime.batch import Bucket

BUCKETS = Bucket(2, 2), Bucket(4, 4), Bucket(16, 4), Bucket(64, 4)


def prepared(model: ModelConfig) -> Prepared:
    """An engine with programs of every kind."""
    config = EngineConfig(
        model="random",
        max_logprobs=2,
        parallel=ParallelConfig(tp=2),
        cache=CacheConfig(num_pages=20, host_memory_bytes=2**20),
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=64, decode_steps=4),
        gpu=GpuConfig(layer_form=LayerForm.UNSTACKED),
    )
    return prepare_random(config, model, buckets=BUCKETS)


def requests() -> list[Request]:
    """Prompts of all lengths, more than the pages hold at once, with every kind of sampling and rules."""
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": TokenSampling(temperature=0.9, top_p=0.8, seed=0)},
        {"sampling": TokenSampling(temperature=0.7, seed=0), "rules": LogitRules(presence_penalty=1.0)},
        {
            "sampling": TokenSampling(temperature=1.1, top_k=5, seed=0),
            "min_tokens": 4,
            "stop_ids": (3,),
        },
        {"logprobs": 2, "prompt_logprobs": 1},
        {"sampling": TokenSampling(temperature=1.0, seed=3)},
    ]
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=tuple((7 * number + at) % 100 for at in range(3 + 11 * number)),
            max_tokens=18,
            **kinds[number % len(kinds)],
        )
        for number in range(10)
    ]


def tokens(engine: Prepared) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for request in requests():
        engine.loop.scheduler.add(request)
        found[request.request_id] = []
    for _ in range(1000):
        if not engine.loop.has_work:
            break
        for output in engine.loop.step():
            assert output.token_id is not None
            found[output.request_id].append(output.token_id)
    assert not engine.loop.has_work
    return found


def test_each_program_is_run_and_nothing_is_compiled_after_it(
    shape: ModelConfig, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = prepared(shape)
    calls: Counter[int] = Counter()
    run = jax.stages.Compiled.__call__

    def counted(self: jax.stages.Compiled, *args: Any, **kwargs: Any) -> Any:
        calls[id(self)] += 1
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(jax.stages.Compiled, "__call__", counted)
        engine.executor.warm_up()
    programs = engine.executor._compiled
    assert len(programs) > 40
    assert [name for name, program in programs.items() if not calls[id(program)]] == []
    compilations.clear()
    answers = tokens(engine)
    assert compilations == []
    assert engine.executor.copied.to_host > 0
    assert answers == tokens(prepared(shape))
