"""The gates on programs for GPUs: shapes against the arithmetic of core, and faults planted in them.

Compiling for GPUs itself is `make gpu-check`; here the same programs are traced for CPU devices.
"""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from albireo_jax.core.config import Dtype, KvDtype
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.ops.cuda.kernels import Entry
from albireo_jax.runtime.batch import SLOT_FIELDS, layout
from albireo_jax.runtime.decode_loop import DecodeLoop
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.logit_rule_calls import LogitRuleProgram
from albireo_jax.runtime.logprob_calls import LogprobProgram
from albireo_jax.runtime.min_tokens import MinTokensProgram
from albireo_jax.runtime.step import LayerLoop, jit_forward
from albireo_jax.sampling.routes import Route
from benchmarks.gpu_programs.compiled_programs import (
    DECODE,
    MIXED,
    MODELS,
    NUM_PAGES,
    PAGE_SIZE,
    ProgramCase,
    mesh_of,
    programs,
    rules_of,
    state_of,
    step_program,
    weights_of,
)
from benchmarks.gpu_programs.gates import breaches, depth_breaches, temp_limit
from benchmarks.gpu_programs.kernel_assembly import (
    launches,
    own_kernels,
)
from benchmarks.gpu_programs.program_figures import LaunchOrder, figures, launch_order
from tests.labs.program_lab import CASE, LAUNCHES, compiled_text, good_decode, good_sampling

LOOP = DecodeLoop(rows=8, route=Route.GREEDY, steps=4)


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
    case = ProgramCase(model=model, tp=tp, layers=4)
    program = program_of(case)
    assert share_bytes(weights_of(program)) == weight_bytes(case.config, tp=tp, dtype=Dtype.BFLOAT16)
    stacked = weights_of(replace(program, layers=LayerLoop.UNROLLED))
    assert share_bytes(stacked) == share_bytes(weights_of(program))
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(weights_of(program)))
    for kv_dtype in (KvDtype.AUTO, KvDtype.FP8):
        page = page_bytes(case.config, tp=tp, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16, kv_dtype=kv_dtype)
        assert share_bytes(state_of(program, kv_dtype).cache.kv) == (NUM_PAGES + 1) * page


def test_the_programs_are_those_of_an_engine():
    named = programs(program_of(CASE))
    assert {DECODE, MIXED, "admit", "begin with pages"} < set(named)
    routes = {name.route for name in named if isinstance(name, Sampling)}
    assert routes == {Route.GREEDY, Route.UNFILTERED, Route.CANDIDATES, Route.ALL_TO_ALL}
    assert {name.route for name in named if isinstance(name, DecodeLoop)} == {Route.GREEDY, Route.ALL_TO_ALL}
    assert named["admit"]().compile().memory_analysis().alias_size_in_bytes > 0


@pytest.mark.parametrize("bucket", [DECODE, MIXED])
def test_the_kernels_of_a_layer_are_those_that_its_step_launches(bucket):
    seen = []

    def note(what, _):
        seen.append(what)
        return [jnp.zeros(result.shape, result.dtype) for result in what.results]

    program = step_program(CASE, mesh_of(jax.devices(), CASE.tp), note)
    shape = layout(bucket, PAGE_SIZE)

    def forward(weights, cache, last_token_Z, words):
        return jit_forward(program, shape, weights)(weights, cache, last_token_Z, words)

    state = state_of(program)
    words = program.ints(shape.num_words)
    jax.eval_shape(forward, weights_of(program), state.cache, state.sampler.last_token_Z, words)
    first, *layer = launches(CASE.config, bucket, tp=CASE.tp)
    added = [what for what in seen if what.kernel.entry is Entry.ADD]
    assert [what for what in seen if what not in added] == [first, *(CASE.layers * layer)]
    assert len(added) == 2 * CASE.layers - 1
    assert len(seen) == own_kernels(CASE.config, bucket, tp=CASE.tp)


def test_a_layer_sliced_out_of_a_stack_is_a_copy_and_a_product_is_none():
    w_down_LFD = jax.ShapeDtypeStruct((2, 1792, 4096), jnp.bfloat16)
    x_TF = jax.ShapeDtypeStruct((64, 1792), jnp.bfloat16)
    assert figures(CASE, compiled_text(lambda w: w[1] + 1, w_down_LFD)).weight_copies >= 1
    assert figures(CASE, compiled_text(lambda x: x @ x.T, x_TF)).weight_copies == 0


def test_a_pool_that_is_not_written_in_place_is_a_copy():
    k_LPSNK = jax.ShapeDtypeStruct((2, NUM_PAGES + 1, PAGE_SIZE, 1, 128), jnp.bfloat16)
    assert figures(CASE, compiled_text(lambda k: k + 1, k_LPSNK)).pool_copies >= 1


def test_a_layers_own_array_that_is_written_anew_is_a_copy():
    w_down_FD = jax.ShapeDtypeStruct((1792, 4096), jnp.bfloat16)
    assert figures(CASE, compiled_text(lambda w: w + 1, w_down_FD)).weight_copies >= 1


def test_launches_are_counted_inside_and_outside_of_command_buffers():
    lone = Counter(kCustomKernel=3, kWhile=1, kCopy=1, kConditional=1, kAllReduce=1)
    assert launch_order(LAUNCHES) == LaunchOrder(buffers=2, lone=lone, longest_run=2)


def test_the_host_waits_where_only_the_device_knows_what_comes_next():
    shape = jax.ShapeDtypeStruct((), jnp.int32)

    def counted(x):
        return jax.lax.fori_loop(0, 9, lambda _, x: x * x, x)

    def open_ended(x):
        return jax.lax.while_loop(lambda x: x < 9, lambda x: x * x + 1, x)

    found = [compiled_text(function, shape) for function in (counted, open_ended)]
    assert [figures(CASE, replace(each, launches="")).host_waits for each in found] == [0, 1]
    assert [figures(CASE, each).host_waits for each in found] == [
        1,
        2,
    ]  # a loop and a conditional of LAUNCHES


def test_a_good_step_breaks_no_gate():
    assert breaches(CASE, DECODE, good_decode()) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"weight_copies": 1},
        {"pool_copies": 1},
        {"temp_bytes": temp_limit(CASE, DECODE) + 1},
        {"num_arguments": 23},
        {"product_bodies": 6},
        {"argument_bytes": 2**20},
        {"alias_bytes": 0},
        {"output_bytes": 2**30},
        {"loops": 1},
        {"host_waits": 1},
        {"kernels": 2},
        {"command_buffers": 0},
        {"command_buffers": 8},
        {"command_buffers": None},
        {"longest_run": 5},
        {"launches": 2 * 11 + 16},
        {"collectives": Counter({("all-reduce", 64 * 4096 * 2): 6})},
        {"collectives": Counter({("all-reduce", 64 * 4096 * 2): 5, ("all-gather", 2**20): 1})},
    ],
)
def test_each_fault_breaks_one_gate(fault):
    assert len(breaches(CASE, DECODE, replace(good_decode(), **fault))) == 1


def test_one_device_has_one_command_buffer_and_nothing_outside():
    case = replace(CASE, tp=1)
    weights = weight_bytes(case.config, tp=1, dtype=Dtype.BFLOAT16)
    pool = (NUM_PAGES + 1) * page_bytes(case.config, tp=1, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16)
    alone = replace(
        good_decode(),
        argument_bytes=weights + pool,
        alias_bytes=pool + 65 * 512 * 4,
        output_bytes=pool + 65 * 512 * 4,
        collectives=Counter(),
        kernels=5,
        launches=26,
        command_buffers=1,
        lone_launches=Counter(),
        longest_run=0,
    )
    assert breaches(case, DECODE, alone) == []
    assert len(breaches(case, DECODE, replace(alone, command_buffers=2))) == 1
    assert len(breaches(case, DECODE, replace(alone, longest_run=1))) == 1
    whole, graphs = replace(good_decode(), command_buffers=1), replace(CASE, graph_collectives=True)
    assert breaches(graphs, DECODE, replace(whole, longest_run=0)) == []
    assert len(breaches(graphs, DECODE, replace(whole, command_buffers=2, longest_run=1))) == 2
    sampler = replace(alone, alias_bytes=4 * 65 * (1 + SLOT_FIELDS), output_bytes=2**20)
    for route in (Route.GREEDY, Route.ALL_TO_ALL):
        sampler = replace(sampler, kernels=2, launches=6)
        assert breaches(case, Sampling(64, route), sampler) == []
        for fault in ({"host_waits": 1}, {"command_buffers": 0}, {"longest_run": 3}):
            assert len(breaches(case, Sampling(64, route), replace(sampler, **fault))) == 1


def good_loop():
    """Figures of a loop of decode steps that breaks no gate."""
    state = good_decode().alias_bytes + 4 * 65 * (1 + SLOT_FIELDS)
    return replace(good_decode(), alias_bytes=state, loops=1, host_waits=1)


def test_a_good_loop_of_decode_steps_breaks_no_gate():
    assert breaches(CASE, LOOP, good_loop()) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"weight_copies": 2},
        {"pool_copies": 1},
        {"alias_bytes": 0},
        {"argument_bytes": 2**20},
        {"temp_bytes": 2**27},
        {"host_waits": 2},
        {"kernels": 0},
    ],
)
def test_each_fault_of_a_loop_of_decode_steps_breaks_one_gate(fault):
    assert len(breaches(CASE, LOOP, replace(good_loop(), **fault))) == 1


def test_waits_of_the_host_break_the_gate_of_sampling():
    name = Sampling(64, Route.GREEDY)
    assert breaches(CASE, name, good_sampling()) == []
    assert len(breaches(CASE, name, replace(good_sampling(), host_waits=1))) == 1


def test_what_admits_and_bans_neither_sends_nor_waits():
    quiet = good_sampling()
    assert (
        breaches(CASE, "admit", quiet)
        == breaches(CASE, MinTokensProgram(64), replace(quiet, alias_bytes=0))
        == []
    )
    for fault in ({"host_waits": 1}, {"collectives": Counter({("all-reduce", 256): 1})}):
        assert len(breaches(CASE, "admit", replace(quiet, **fault))) == 1


def beside_sampling(kind):
    """The names of programs that apply rules or score tokens, of this kind."""
    named = programs(program_of(CASE))
    return [
        name for name in named if isinstance(name, LogitRuleProgram | LogprobProgram) and name.kind == kind
    ]


@pytest.mark.parametrize("kind", ["admit rules", "write masks", "apply rules", "note tokens"])
def test_rules_are_written_in_place_and_send_nothing(kind):
    (name,) = beside_sampling(kind)
    own = 0 if kind == "apply rules" else share_bytes(rules_of(program_of(CASE)))
    good = replace(good_sampling(), alias_bytes=own, output_bytes=own + 2**20)
    assert breaches(CASE, name, good) == []
    sent = Counter({("all-gather", 64 * 4): 1})
    for fault in ({"host_waits": 1}, {"collectives": sent}, {"alias_bytes": own + 4}):
        assert len(breaches(CASE, name, replace(good, **fault))) == 1


def test_scores_send_few_numbers_a_token():
    good = replace(good_sampling(), alias_bytes=0)
    for name in beside_sampling("score sampled tokens"):
        sums, best = ("all-reduce", 4 * name.wanted), ("all-gather", 8 * 20 * 8 * name.wanted)
        scored = replace(good, collectives=Counter({sums: 4, best: 1}))
        assert breaches(CASE, name, scored) == []
        assert len(breaches(CASE, name, replace(good, collectives=Counter({sums: 5, best: 1})))) == 1
        assert len(breaches(CASE, name, replace(scored, host_waits=1))) == 1


def test_temporaries_must_not_grow_with_the_depth():
    shallow = replace(good_decode(), temp_bytes=10**7)
    assert depth_breaches(shallow, replace(shallow, temp_bytes=10**7 + 1000)) == []
    for fault in ({"temp_bytes": 2 * 10**7}, {"product_bodies": shallow.product_bodies + 1}):
        assert depth_breaches(shallow, replace(shallow, **fault))
    small = replace(shallow, temp_bytes=3016472)
    assert depth_breaches(small, replace(small, temp_bytes=3170840)) == []
    assert depth_breaches(small, replace(small, temp_bytes=3016472 + 2**19))  # activations of a layer


def test_limits_of_temporaries_of_decode_steps_lie_below_a_layers_weights():
    for model, config in MODELS.items():
        for tp in (1, 2, 4, 8):
            case = ProgramCase(model=model, tp=tp, layers=2)
            layer = weight_bytes(case.config, tp=tp, dtype=Dtype.BFLOAT16) - weight_bytes(
                replace(config, num_layers=1), tp=tp, dtype=Dtype.BFLOAT16
            )
            assert temp_limit(case, DECODE) < layer
