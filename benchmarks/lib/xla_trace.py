"""The trace of a run by XLA's profiler."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions


class TracedEvent(NamedTuple):
    """One event of a trace: where it stands, its name, and when it ran, in nanoseconds."""

    plane: str
    line: str
    name: str
    begin_ns: float
    duration_ns: float


def traced_events(run: Callable[[], object], *, host: bool = True) -> list[TracedEvent]:
    """All events while `run` computes its result; without those of the host's threads unless `host`."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    if not host:
        options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        return [event for file in Path(folder).rglob("*.xplane.pb") for event in _events(file)]


def _events(file: Path) -> Iterator[TracedEvent]:
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                yield TracedEvent(plane.name, line.name, event.name, event.start_ns, event.duration_ns)
