"""When kernels ran on a GPU, from a profiler's trace, and how long none did."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.lib.xla_trace import traced_events

_DEVICE, _STREAM, _NO_KERNELS = "/device:GPU", "Stream", ("Memcpy", "Memset")


class KernelSpan(NamedTuple):
    """From when to when something ran, in nanoseconds."""

    begin_ns: float
    end_ns: float
    name: str = ""


def kernel_spans(run: Callable[[], object]) -> list[KernelSpan]:
    """Kernels that ran on GPUs during `run`, from a trace of it; none where there is no GPU."""
    # Other lines than streams sum up what the streams did.
    return [
        KernelSpan(event.begin_ns, event.begin_ns + event.duration_ns, event.name)
        for event in traced_events(run, host=False)
        if event.plane.startswith(_DEVICE)
        and event.line.startswith(_STREAM)
        and not event.name.startswith(_NO_KERNELS)
    ]


def idle_share(spans: Sequence[KernelSpan]) -> float:
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


def seconds_by_name(spans: Iterable[KernelSpan]) -> dict[str, float]:
    """Seconds of all kernels of a name, the largest first."""
    total_ns = Counter[str]()
    for span in spans:
        total_ns[span.name] += span.end_ns - span.begin_ns  # type: ignore[operator]
    return {name: nanoseconds / 1e9 for name, nanoseconds in total_ns.most_common()}
