"""How often each instruction of a compiled program runs on a CPU, by a profiler's trace."""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData, ProfileOptions


def count_runs(execute: Callable[[], object]) -> Counter[str]:
    """Runs of each instruction by name, on all devices together, while `execute` computes its result.

    Instructions inside of loops and of the branches that are taken have their own counts; parts of a fusion
    have none. Only instructions of one program may run, since names tell no programs apart.
    """
    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(execute())
        (file,) = Path(folder).rglob("*.xplane.pb")
        trace = ProfileData.from_file(str(file))
        return Counter(event.name for plane in trace.planes for line in plane.lines for event in line.events)
