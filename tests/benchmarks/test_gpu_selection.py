"""The gates on the sampling of rows that filter: launches, kernels, and passes over the logits."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from albireo_jax.runtime.executor import Sampling
from albireo_jax.sampling.routes import Route
from benchmarks.gpu_programs.gates import breaches
from benchmarks.gpu_programs.kernel_assembly import Assembled, kernel_breaches, sampling_kernels
from benchmarks.gpu_programs.program_figures import figures
from tests.labs.program_lab import CASE, compiled_text, good_sampling


def good_selection(tp, rows=64):
    """Figures of the sampling of rows that filter, which breaks no gate."""
    logits_bytes = 4 * rows // tp * CASE.config.padded_vocab_size(tp)
    return replace(good_sampling(), kernels=2, launches=6, read_bytes=6 * logits_bytes)


@pytest.mark.parametrize("tp", [1, 8])
def test_more_launches_and_passes_break_the_gates_of_rows_that_filter(tp):
    case, name = replace(CASE, tp=tp), Sampling(64, Route.ALL_TO_ALL)
    good = replace(good_selection(tp), command_buffers=1, lone_launches=Counter(), longest_run=0)
    assert breaches(case, name, good) == []
    more = {"launches": 7 if tp == 1 else 11}, {"read_bytes": good.read_bytes * 3 // 2}, {"kernels": 0}
    for fault in more:
        assert len(breaches(case, name, replace(good, **fault))) == 1
    wider = replace(good, launches=more[0]["launches"], read_bytes=more[1]["read_bytes"])
    assert breaches(case, Sampling(64, Route.UNFILTERED), wider) == []


def test_reads_are_those_of_the_bytes_of_operands():
    shape = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    found = figures(CASE, compiled_text(lambda x: jnp.sin(x) + 1, shape))
    assert (found.read_bytes, found.launches) == (512 * 256 * 4, 8)


def test_gathered_logits_break_the_gate_of_sampling():
    name = Sampling(64, Route.ALL_TO_ALL)
    gathered = replace(good_selection(8), collectives=Counter({("all-gather", 64 * 128256 * 4): 1}))
    assert breaches(CASE, name, good_selection(8)) == []
    assert len(breaches(CASE, name, gathered)) == 2


def test_spills_and_too_many_registers_break_the_gates_of_sampling_kernels():
    good = Assembled(registers=64, stack_bytes=0, spill_bytes=0, shared_bytes=48280)
    kernel = sampling_kernels(CASE.config, tp=8)["draw"]
    assert kernel_breaches("draw", kernel, good, architecture="sm_90") == []
    for fault in ({"spill_bytes": 4}, {"stack_bytes": 8}, {"registers": 65}):
        assert len(kernel_breaches("draw", kernel, replace(good, **fault), architecture="sm_90")) == 1
