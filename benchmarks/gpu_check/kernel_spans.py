"""When kernels ran on a GPU, from a profiler's trace, and how long none did."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions

_DEVICE, _STREAM, _NO_KERNELS = "/device:GPU", "Stream", ("Memcpy", "Memset")


class Span(NamedTuple):
    """From when to when something ran, in nanoseconds."""

    begin_ns: float
    end_ns: float
    name: str = ""


def kernel_spans(run: Callable[[], object]) -> list[Span]:
    """Kernels that ran on GPUs during `run`, from a trace of it; none where there is no GPU."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = Path(folder).rglob("*.xplane.pb")
        return [span for file in files for span in _spans(ProfileData.from_file(str(file)))]


def idle_share(spans: Sequence[Span]) -> float:
    """The part of the time from the first kernel's begin to the last one's end in which none runs.

    Kernels may overlap, as those of several streams do. Raises ValueError if there are none.
    """
    if not spans:
        raise ValueError("no kernel ran")
    ordered = sorted(spans)
    idle_ns, busy_until_ns = 0.0, ordered[0].begin_ns
    for span in ordered:
        idle_ns += max(0.0, span.begin_ns - busy_until_ns)
        busy_until_ns = max(busy_until_ns, span.end_ns)
    whole_ns = busy_until_ns - ordered[0].begin_ns
    return idle_ns / whole_ns if whole_ns else 0.0


def seconds_by_name(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of all kernels of a name, the largest first."""
    total_ns = Counter[str]()
    for span in spans:
        total_ns[span.name] += span.end_ns - span.begin_ns  # type: ignore[operator]
    return {name: nanoseconds / 1e9 for name, nanoseconds in total_ns.most_common()}


def _spans(trace: Any) -> Iterable[Span]:
    for plane in trace.planes:
        if not plane.name.startswith(_DEVICE):
            continue
        for line in plane.lines:
            if not line.name.startswith(_STREAM):
                continue  # other lines sum up what the streams did
            for event in line.events:
                if not event.name.startswith(_NO_KERNELS):
                    yield Span(event.start_ns, event.start_ns + event.duration_ns, event.name)
