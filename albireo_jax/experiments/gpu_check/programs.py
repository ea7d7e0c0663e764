"""The real decode step as the compiler of this device makes it, tuned kernels and all, held to the gates.

The gates themselves are `gpu_gates`, which look at programs compiled without a GPU too. What is new here is
that matrix products are tuned on the device, so that other kernels may be chosen. The description of the
device for compiling without one can be written to a file.
"""

import gzip
from dataclasses import replace
from pathlib import Path

import jax
from jaxlib import xla_client

from albireo_jax.experiments.gpu_check.check import LARGE, Check
from albireo_jax.experiments.gpu_figures import Figures, figures
from albireo_jax.experiments.gpu_gates import breaches
from albireo_jax.experiments.gpu_programs import (
    DECODE,
    Case,
    compile_program,
    mesh_of,
    programs,
    step_program,
)
from albireo_jax.runtime.batch import Bucket

_LAYERS = 4
_SMALL_LAYERS = 1


def run_programs(check: Check) -> None:
    """The decode step of 64 rows, a few layers deep, and the files that were asked for."""
    if check.dump_target is not None:
        _dump_target(check, check.dump_target)
    case = Case(model=LARGE, tp=1, layers=_SMALL_LAYERS if check.small else _LAYERS)
    program = step_program(case, mesh_of(jax.devices(), 1))
    if check.on_cpu:
        program = replace(program, launch=None)  # kernels are for GPUs
    named = programs(program)
    compiled = compile_program(named[DECODE]())
    _note(check, case, DECODE, found=figures(case, compiled))
    if check.dump_hlo is not None:
        check.dump_hlo.parent.mkdir(parents=True, exist_ok=True)
        check.dump_hlo.write_bytes(gzip.compress(compiled.text.encode(), mtime=0))


def _note(check: Check, case: Case, name: Bucket, *, found: Figures) -> None:
    broken = breaches(case, name, found)
    numbers = {
        "weight copies": found.weight_copies,
        "pool copies": found.pool_copies,
        "loops": found.loops,
        "arguments": found.num_arguments,
        "gates broken": len(broken),
    }
    if found.command_buffers is not None and found.lone_launches is not None:
        numbers["command buffers"] = found.command_buffers
        numbers["launches outside of them"] = sum(found.lone_launches.values())
    else:
        check.notebook.leave_out("command buffers", "XLA gave no sequence of launches for this device")
    label = f"decode {name.rows} rows, {case.layers} layers"
    for metric, number in numbers.items():
        check.notebook.add(case.model, label, metric=metric, unit="1", samples=[number])
    check.notebook.add(case.model, label, metric="temporaries", unit="bytes", samples=[found.temp_bytes])
    for line in broken:
        print(f"GATE {label}: {line}", flush=True)  # noqa: T201


def _dump_target(check: Check, file: Path) -> None:
    """What XLA's compiler must know of this device, as tests/data has it."""
    described = xla_client.get_topology_for_devices(jax.devices())
    try:
        target = described.target_config
    except AttributeError:
        check.notebook.leave_out("target configuration", f"{jax.devices()[0].platform} has none")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(target))
