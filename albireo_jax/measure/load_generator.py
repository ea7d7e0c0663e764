"""A load offered to a real engine: each request is submitted at its arrival, and its tokens are timed."""

import time
from collections.abc import Sequence
from dataclasses import replace

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.service import EngineService
from albireo_jax.sim.outcome import Outcome, outcome
from albireo_jax.sim.workload import TimedOutput


def run_load(loop: EngineLoop, limits: EngineLimits, requests: Sequence[Request]) -> Outcome:
    """Run `requests`, in order of arrival, to their ends; seconds count from the start of the run.

    The loop runs on a service's thread, as in a server, but no text is made. Requests arrive `arrived_s`
    after the start, all at once if these are 0. Moments are those in which a step's outputs were handed out.
    The loop may be offered more requests afterwards. Raises ValueError if the engine could never finish one
    of the requests, EngineDeadError if it died.
    """
    outputs: list[TimedOutput] = []

    def deliver(new: list[RequestOutput]) -> None:
        now_s = time.perf_counter() - began_s
        outputs.extend(TimedOutput(now_s, output) for output in new)

    for request in requests:
        limits.check(request)
    service = EngineService(loop, limits)
    began_s = time.perf_counter()
    service.start(deliver)
    try:
        for group in _by_arrival(requests):
            time.sleep(max(0.0, group[0].arrived_s - (time.perf_counter() - began_s)))
            service.submit(*(replace(request, arrived_s=began_s + request.arrived_s) for request in group))
        service.drain()
    finally:
        service.stop()
    return outcome(requests, outputs)


def _by_arrival(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests that arrive at the same moment, together."""
    groups: list[list[Request]] = []
    for request in requests:
        if not groups or groups[-1][0].arrived_s != request.arrived_s:
            groups.append([])
        groups[-1].append(request)
    return groups
