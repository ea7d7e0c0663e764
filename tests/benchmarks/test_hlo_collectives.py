"""Bytes and operations read from programs, against programs whose bytes and operations are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from benchmarks.lib.hlo import ArrayType, parse
from benchmarks.lib.hlo_collectives import collectives
from benchmarks.lib.hlo_operations import operations
from benchmarks.route_costs import count_runs

ELEMENTS = 100_000
RANKS = 8
ASYNCHRONOUS = """HloModule step, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

ENTRY %main_spmd (a: bf16[16,32]) -> bf16[128,32] {
  %a = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %r-start = bf16[16,32]{1,0} all-reduce-start(%a), channel_id=1, to_apply=%add
  %r-done = bf16[16,32]{1,0} all-reduce-done(%r-start)
  %g-start = (bf16[16,32]{1,0}, bf16[128,32]{1,0}) all-gather-start(%r-done), channel_id=2, dimensions={0}
  %t = ((bf16[16,32]{1,0}), (token[], pred[3])) tuple(%a, %a), metadata={op_name="f(%a) all-reduce(%x)"}
  ROOT %g-done = bf16[128,32]{1,0} all-gather-done(%g-start)
}
"""


def compiled(function, *arrays):
    """The function over 8 ranks, each with all of the arrays."""
    mesh = Mesh(np.array(jax.devices()[:RANKS]), ("tp",), axis_types=(AxisType.Auto,))
    everywhere = PartitionSpec()
    stage = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return jax.jit(stage).lower(*arrays).compile()


def program_of(function, *arrays):
    return parse(compiled(function, *arrays).as_text())


@pytest.mark.parametrize(
    ("kind", "send", "words"),
    [
        ("all-reduce", lambda x: lax.psum(x, "tp"), 48 * 10),
        ("all-gather", lambda x: lax.all_gather(x, "tp", tiled=True), 8 * 48 * 10),
        ("all-to-all", lambda x: lax.all_to_all(x, "tp", 0, 1, tiled=True), 48 * 10),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "tp", tiled=True), 48 * 10 / 8),
        ("collective-permute", lambda x: lax.ppermute(x, "tp", [(i, 7 - i) for i in range(8)]), 48 * 10),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_collective_counts_with_its_result(kind, send, words, dtype):
    (one,) = collectives(program_of(send, jnp.zeros((48, 10), dtype)))
    assert (one.kind, one.within) == (kind, ())
    assert one.result_bytes == words * np.dtype(dtype).itemsize


def test_a_collective_knows_what_decides_whether_it_runs():
    def send(x, turns):
        sent = lax.fori_loop(0, turns[0], lambda _, x: lax.psum(x, "tp") + 1, x)
        return lax.cond(turns[0] > 3, lambda: lax.all_gather(sent, "tp").sum(axis=0), lambda: sent)

    program = program_of(send, jnp.zeros(4096), jnp.ones(1, jnp.int32))
    opcodes = {one.name: one.opcode for one in program.instructions()}
    within = {one.kind: [opcodes[name] for name in one.within] for one in collectives(program)}
    assert within == {"all-reduce": ["while"], "all-gather": ["conditional"]}


def test_an_asynchronous_collective_counts_once_with_what_it_ends_with():
    sent = collectives(parse(ASYNCHRONOUS))
    assert [(one.kind, one.result_bytes) for one in sent] == [
        ("all-reduce", 16 * 32 * 2),
        ("all-gather", 128 * 32 * 2),
    ]


def test_an_instruction_is_read_whole():
    program = parse(ASYNCHRONOUS)
    assert program.entry == "main_spmd"
    (pair,) = (one for one in program.instructions() if one.name == "t")
    assert pair.opcode == "tuple"
    assert pair.operands == ("a", "a")
    assert pair.result == (ArrayType("bf16", (16, 32)), ArrayType("token", ()), ArrayType("pred", (3,)))
    assert [array.bytes for array in pair.result] == [1024, 0, 3]
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")


def test_operations_are_those_that_xla_counts_where_nothing_branches():
    def work(x):
        return jnp.exp(x * x + 1) / (2 + jnp.abs(x)), (x > 0).astype(jnp.int32) ^ 5

    done = jax.jit(work).lower(jnp.zeros((64, 50))).compile()
    program, cost = parse(done.as_text()), done.cost_analysis()
    fused = {name for one in program.instructions() if one.opcode == "fusion" for name in one.called}
    ran = [one.name for name, all_ in program.computations.items() if name not in fused for one in all_]
    assert operations(program, dict.fromkeys(ran, 1)) == cost["flops"] + cost["transcendentals"]


def test_a_reduction_counts_what_it_reads_and_a_sort_its_comparisons():
    def largest(program, opcode):
        return max(
            operations(program, {one.name: 1}) for one in program.instructions() if one.opcode == opcode
        )

    summed = parse(jax.jit(lambda x: x.max(axis=1)).lower(jnp.zeros((64, 16))).compile().as_text())
    assert largest(summed, "reduce") == 64 * 16
    by_sort = parse(
        jax.jit(partial(lax.sort, dimension=0)).lower(jnp.zeros((1000, 3), jnp.int32)).compile().as_text()
    )
    assert largest(by_sort, "sort") == 3000 * 10


def turning(turn, turns, *, known_turns=None):
    """A compiled loop of so many turns, and a sine if there are many, with what it is called with."""

    def work(x, turns):
        turned = lax.fori_loop(0, known_turns or turns[0], lambda _, x: turn(x), x)
        return lax.cond(turns[0] > 1, lambda: jnp.sin(turned), lambda: turned)

    arrays = jnp.zeros(ELEMENTS), jnp.full(1, turns, jnp.int32)
    return compiled(work, *arrays), arrays


def counted(done, arrays):
    """Operations per rank and element."""
    jax.block_until_ready(done(*arrays))
    return operations(parse(done.as_text()), count_runs(lambda: done(*arrays))) / RANKS / ELEMENTS


@pytest.mark.parametrize("turns", [0, 1, 11])
def test_a_trace_counts_turns_and_branches_taken(turns):
    got = counted(*turning(lambda x: lax.psum(x * x + 1, "tp"), turns))
    assert got == pytest.approx(2 * turns + (turns > 1), abs=0.01)


def test_a_loop_that_a_trace_does_not_show_counts_with_its_turns():
    got = counted(*turning(lambda x: x * x + 1, 2, known_turns=9))
    assert got == pytest.approx(2 * 9 + 1, abs=0.01)


@pytest.mark.parametrize("turns", [0, 2, 5])
def test_a_loop_of_unknown_turns_is_refused_where_a_trace_does_not_show_it(turns):
    done, arrays = turning(lambda x: x * x + 1, turns)
    if 'xla_cpu_small_call="true"' in (
        done.as_text() or ""
    ):  # as jax 0.12 has it: one call, of which nothing shows
        with pytest.raises(ValueError, match="how often it turns"):
            counted(done, arrays)
    else:
        assert counted(done, arrays) == pytest.approx(2 * turns + (turns > 1), abs=0.01)
