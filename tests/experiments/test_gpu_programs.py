"""The gates on programs for GPUs: shapes against the arithmetic of core, and faults planted in them.

Compiling for GPUs itself is `make gpu-check`; here the same programs are traced for CPU devices.
"""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.experiments.gpu_gates import (
    breaches,
    command_buffers,
    depth_breaches,
    figures,
    temp_limit,
)
from albireo_jax.experiments.gpu_programs import (
    DECODE,
    MIXED,
    MODELS,
    NUM_PAGES,
    PAGE_SIZE,
    Case,
    CompiledProgram,
    mesh_of,
    programs,
    state_of,
    step_program,
    weights_of,
)
from albireo_jax.runtime.executor import Sampling
from albireo_jax.sampling.routes import Route

CASE = Case(model="llama-3.1-8b", tp=8, layers=2)
LAUNCHES = """\
001: kCustomKernel [source] one
000: kCommandBuffer [source]
    002: kCustomKernel [source] two
    003: kCopy [source] three
004: kWhile [prev=000]
condition:
    005: kCustomKernel [source] four
  body:
    000: kCommandBuffer [source]
        006: kCustomKernel [source] five
007: kAllReduce [prev=004] six
"""


def program_of(case):
    return step_program(case, mesh_of(jax.devices(), case.tp))


def share_bytes(tree):
    """Bytes of the arrays of a tree on one device."""
    arrays = jax.tree.leaves(tree)
    return sum(
        jnp.dtype(x.dtype).itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape))))
        for x in arrays
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_weights_and_pool_are_those_of_the_arithmetic(model, tp):
    case = Case(model=model, tp=tp, layers=4)
    program = program_of(case)
    assert share_bytes(weights_of(program)) == weight_bytes(case.config, tp=tp, dtype=Dtype.BFLOAT16)
    page = page_bytes(case.config, tp=tp, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16)
    assert share_bytes(state_of(program).cache.kv) == (NUM_PAGES + 1) * page


def test_the_programs_are_those_of_an_engine():
    named = programs(program_of(CASE))
    assert {DECODE, MIXED, "admit", "begin with pages"} < set(named)
    routes = {name.route for name in named if isinstance(name, Sampling)}
    assert routes == {Route.GREEDY, Route.UNFILTERED, Route.CANDIDATES, Route.ALL_TO_ALL}
    assert named["admit"]().compile().memory_analysis().alias_size_in_bytes > 0


def compiled_text(function, *shapes):
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return CompiledProgram(
        text=text, argument_bytes=0, alias_bytes=0, temp_bytes=0, output_bytes=0, launches=LAUNCHES
    )


def test_a_layer_sliced_out_of_a_stack_is_a_copy_and_a_product_is_none():
    w_down_LFD = jax.ShapeDtypeStruct((2, 1792, 4096), jnp.bfloat16)
    x_TF = jax.ShapeDtypeStruct((64, 1792), jnp.bfloat16)
    assert figures(CASE, compiled_text(lambda w: w[1] + 1, w_down_LFD)).weight_copies >= 1
    assert figures(CASE, compiled_text(lambda x: x @ x.T, x_TF)).weight_copies == 0


def test_a_pool_that_is_not_written_in_place_is_a_copy():
    k_LPSNK = jax.ShapeDtypeStruct((2, NUM_PAGES + 1, PAGE_SIZE, 1, 128), jnp.bfloat16)
    assert figures(CASE, compiled_text(lambda k: k + 1, k_LPSNK)).pool_copies >= 1


def test_launches_are_counted_inside_and_outside_of_command_buffers():
    buffers, lone = command_buffers(LAUNCHES)
    assert buffers == 2
    assert lone == {"kCustomKernel": 2, "kWhile": 1, "kAllReduce": 1}


def good_decode():
    """Figures of a decode step that breaks no gate."""
    weights = weight_bytes(CASE.config, tp=8, dtype=Dtype.BFLOAT16)
    pool = (NUM_PAGES + 1) * page_bytes(CASE.config, tp=8, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16)
    plain = figures(CASE, compiled_text(lambda x: x + 1, jax.ShapeDtypeStruct((3,), jnp.float32)))
    return replace(
        plain,
        argument_bytes=weights + pool,
        alias_bytes=pool + 65 * 512 * 4,
        collectives=Counter({("all-reduce", 64 * 4096 * 2): 5}),
    )


def test_a_good_step_breaks_no_gate():
    assert breaches(CASE, DECODE, good_decode()) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"weight_copies": 1},
        {"pool_copies": 1},
        {"temp_bytes": temp_limit(CASE, DECODE) + 1},
        {"num_arguments": 40},
        {"argument_bytes": 2**20},
        {"alias_bytes": 0},
        {"collectives": Counter({("all-reduce", 64 * 4096 * 2): 6})},
        {"collectives": Counter({("all-reduce", 64 * 4096 * 2): 5, ("all-gather", 2**20): 1})},
    ],
)
def test_each_fault_breaks_one_gate(fault):
    assert len(breaches(CASE, DECODE, replace(good_decode(), **fault))) == 1


def test_gathered_logits_break_the_gate_of_sampling():
    sampler = replace(good_decode(), collectives=Counter())
    name = Sampling(64, Route.ALL_TO_ALL)
    gathered = replace(sampler, collectives=Counter({("all-gather", 64 * 128256 * 4): 1}))
    assert len(breaches(CASE, name, gathered)) == len(breaches(CASE, name, sampler)) + 2


def test_temporaries_must_not_grow_with_the_depth():
    shallow = replace(good_decode(), temp_bytes=10**7)
    assert depth_breaches(shallow, replace(shallow, temp_bytes=10**7 + 1000)) == []
    assert depth_breaches(shallow, replace(shallow, temp_bytes=2 * 10**7))


def test_limits_of_temporaries_of_decode_steps_lie_below_a_layers_weights():
    for model, config in MODELS.items():
        for tp in (1, 2, 4, 8):
            case = Case(model=model, tp=tp, layers=2)
            layer = weight_bytes(case.config, tp=tp, dtype=Dtype.BFLOAT16) - weight_bytes(
                replace(config, num_layers=1), tp=tp, dtype=Dtype.BFLOAT16
            )
            assert temp_limit(case, DECODE) < layer
