"""Engines whose layers have arrays of their own, as on GPUs, answer like those of stacked weights."""

from dataclasses import replace
from functools import cache

import jax
import pytest

from albireo_jax.cli.options import EngineFlags
from albireo_jax.core.config import (
    Dtype,
    EngineConfig,
    ParallelConfig,
    Quantization,
    SchedulerConfig,
)
from albireo_jax.core.gpu_options import GpuConfig, LayerForm, ProductLibrary
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.models.registry import random_model
from albireo_jax.nn.decoder import is_unstacked
from albireo_jax.nn.sharding import make_mesh
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.step import LayerLoop

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=120,
    max_position=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


STACKED = GpuConfig(layer_form=LayerForm.STACKED, product_library=ProductLibrary.TRITON)
UNSTACKED = GpuConfig(layer_form=LayerForm.UNSTACKED)


@cache
def prepared(gpu: GpuConfig, *, quantization: Quantization | None = None, steps: int = 1) -> Prepared:
    config = EngineConfig(
        model="random",
        quantization=quantization,
        max_logprobs=2,
        parallel=ParallelConfig(tp=2),
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=32, decode_steps=steps),
        gpu=gpu,
    )
    return prepare_random(config, MODEL, seed=4, buckets=(Bucket(4, 4), Bucket(32, 4)))


def answers(engine: Prepared) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in range(3):
        request = Request(
            request_id=str(number),
            prompt_token_ids=tuple(range(3 + number, 40 + number)),
            max_tokens=8,
            sampling=TokenSampling(temperature=0.8 * (number == 1), seed=number),
            logprobs=2,
            prompt_logprobs=2 if number == 2 else None,
        )
        engine.loop.scheduler.add(request)
        found[request.request_id] = []
    for _ in range(200):
        for output in engine.loop.step():
            assert output.token_id is not None
            found[output.request_id].append(output.token_id)
    assert not engine.loop.has_work
    return found


@pytest.mark.parametrize("quantization", [None, Quantization.FP8])
def test_unstacked_and_stacked_engines_give_the_same_tokens(quantization: Quantization | None) -> None:
    stacked, unstacked = (prepared(gpu, quantization=quantization) for gpu in (STACKED, UNSTACKED))
    assert not is_unstacked(stacked.model.weights())
    assert is_unstacked(unstacked.model.weights())
    assert answers(unstacked) == answers(stacked)


def test_unstacked_weights_are_held_once_and_loops_of_steps_read_them() -> None:
    wanted = answers(prepared(STACKED))
    alive = {id(array) for array in jax.live_arrays()}
    engine = prepared(UNSTACKED, steps=4)
    shape = (MODEL.intermediate_size, MODEL.hidden_size)
    held = [array for array in jax.live_arrays() if array.shape == shape and id(array) not in alive]
    assert len(held) == MODEL.num_layers
    assert answers(engine) == wanted


def test_new_weights_reach_every_step_of_an_unstacked_engine() -> None:
    before = answers(prepared(STACKED))
    other = random_model(MODEL, dtype=Dtype.FLOAT32, mesh=make_mesh(2), seed=9).weights()
    after: list[dict[str, list[int]]] = []
    for gpu in (STACKED, UNSTACKED):
        engine = prepared(gpu)
        own = engine.model.weights()
        for weights in (other, own):
            engine.model.replace_weights(weights)
            engine.executor.replace_weights(engine.model.weights())
            engine.loop.scheduler.forget_prefixes()
            after.append(answers(engine))
    assert after[0] == after[2] != before
    assert after[1] == after[3] == before


def test_the_choices_are_those_of_the_configuration() -> None:
    """On a CPU, which makes its own products, the library changes nothing."""
    for quantization, products in (
        (None, ProductLibrary.CUBLASLT),
        (Quantization.FP8, ProductLibrary.TRITON),
    ):
        program = prepared(UNSTACKED, quantization=quantization).executor.program
        assert (program.layers, program.products) == (LayerLoop.UNSTACKED, products)
    program = prepared(STACKED).executor.program
    assert (program.layers, program.products) == (LayerLoop.SCANNED, ProductLibrary.TRITON)
    assert (
        program.compiler_options == replace(program, products=ProductLibrary.CUBLASLT).compiler_options == {}
    )


def test_names_of_no_form_and_no_library_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_form must be one of \['stacked', 'unstacked'\], got 'flat'"):
        GpuConfig(layer_form="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="product_library must be one of"):
        GpuConfig(product_library="cutlass")  # type: ignore[arg-type]
    assert GpuConfig(layer_form="unstacked") == GpuConfig(layer_form=LayerForm.UNSTACKED)  # type: ignore[arg-type]


def test_flags_leave_step_tokens_to_the_device_and_graphs_without_collectives_unless_they_say_so() -> None:
    config = EngineFlags().engine_config("any")
    assert (config.step_tokens_by_device, config.gpu.cuda_graph_collectives) == (True, False)
    config = EngineFlags({"max_step_tokens": 1024, "cuda_graph_collectives": True}).engine_config("any")
    assert (config.step_tokens_by_device, config.gpu.cuda_graph_collectives) == (False, True)
    assert config.scheduler.max_step_tokens == 1024
    with pytest.raises(ValueError, match="cuda_graph_collectives must be"):
        GpuConfig(cuda_graph_collectives="sometimes")  # type: ignore[arg-type]
