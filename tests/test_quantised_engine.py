"""Engines of quantised models: the door, and tokens that do not depend on degree, layer loop or schedule."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from albireo_jax import LLM
from albireo_jax.core.config import (
    CacheConfig,
    Dtype,
    EngineConfig,
    ParallelConfig,
    Quantization,
    SchedulerConfig,
)
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.types import Request
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.step import LayerLoop

MODEL = ModelConfig(
    architecture="Qwen2ForCausalLM",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=105,
    max_position=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    attention_bias=True,
)


def prepared(
    kind: Quantization, *, tp: int = 1, num_pages: int = 100, max_rows: int = 4, max_step_tokens: int = 16
) -> Prepared:
    config = EngineConfig(
        model="random",
        dtype=Dtype.FLOAT32,
        quantization=kind,
        max_logprobs=0,
        parallel=ParallelConfig(tp=tp),
        cache=CacheConfig(page_size=4, num_pages=num_pages),
        scheduler=SchedulerConfig(max_rows=max_rows, max_step_tokens=max_step_tokens),
    )
    buckets = (Bucket(max_step_tokens, max_rows), Bucket(max_rows, max_rows))
    return prepare_random(config, MODEL, buckets=buckets)


def tokens(engine: Prepared) -> dict[str, list[int]]:
    """What four requests are answered."""
    found: dict[str, list[int]] = {}
    for index in range(4):
        request = Request(request_id=str(index), prompt_token_ids=prompt(index), max_tokens=12)
        found[request.request_id] = []
        engine.loop.scheduler.add(request)
    for _ in range(200):
        for output in engine.loop.step():
            assert output.token_id is not None
            found[output.request_id].append(output.token_id)
    assert not engine.loop.has_work
    return found


def prompt(index: int) -> tuple[int, ...]:
    return tuple(range(3 + index, 12 + 3 * index))


@pytest.mark.parametrize("kind", [Quantization.FP8, Quantization.FP8_W8A16])
def test_an_engine_answers_like_its_model_at_any_degree(kind: Quantization) -> None:
    """Prompts in a scanned loop over layers, answers in one of arrays for each layer; the module is dense."""
    engine = prepared(kind)
    assert engine.model_config == engine.model.config == replace(MODEL, quantization=kind)
    assert engine.executor.program.layers is LayerLoop.UNSTACKED_DECODE
    assert engine.memory.weight_bytes == sum(
        array.nbytes for array in jax.tree.leaves(engine.model.weights())
    )
    answers = tokens(engine)
    for index in (0, 3):
        given, answer = prompt(index), answers[str(index)]
        logits_TV = engine.model(jnp.asarray([*given, *answer[:-1]], jnp.int32))
        assert logits_TV[len(given) - 1 :].argmax(axis=1).tolist() == answer
    assert tokens(prepared(kind, tp=4)) == answers


def test_tokens_of_rounded_rows_do_not_depend_on_the_schedule() -> None:
    """Keys and values are the same made in prompts, in chunks, in decode steps and again after preemption."""
    wanted = tokens(prepared(Quantization.FP8))
    small = prepared(Quantization.FP8, tp=2, num_pages=14, max_rows=3, max_step_tokens=5)
    assert tokens(small) == wanted
    assert small.loop.scheduler.stats().preemptions > 0


def test_an_unknown_kind_is_refused_at_the_door() -> None:
    with pytest.raises(
        ValueError, match=r"quantization must be one of \['int8', 'fp8', 'fp8_w8a16'\], got 'awq'"
    ):
        LLM("smollm2", quantization="awq")
