"""A run of an engine under a load, measured for a report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.plan import Executor
from albireo_jax.core.types import Request
from albireo_jax.engine.energy import EnergyReading
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, Timeline
from albireo_jax.launch import Prepared
from albireo_jax.measure.kv_contention import ContentionMeter
from albireo_jax.measure.load_generator import run_load
from albireo_jax.measure.records import Device, cpu_device, current_commit, versions
from albireo_jax.report.amdahl import Report, ReportedEngine
from albireo_jax.report.perfetto_trace import LaneSpan, lane_spans
from albireo_jax.report.report_load import ReportLoad
from albireo_jax.report.wasted_tokens import WorkMeter
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.outcome import Outcome
from albireo_jax.sim.workload import Arrival

_EXCERPT_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRun:
    """A report, and all spans of the run's lanes for a trace file."""

    report: Report
    spans: Sequence[LaneSpan]


class MeteredLoop:
    """A loop of a new `scheduler` over `executor` that keeps all of its steps, with meters between them."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        config: SchedulerConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._waste = WorkMeter(executor)
        self._contention = ContentionMeter(
            self._waste,
            scheduler,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            clock=clock,
        )
        self._timeline = Timeline(capacity=ALL_STEPS, clock=clock)
        self.loop = EngineLoop(scheduler, self._contention, depth=config.depth, timeline=self._timeline)

    def reported(
        self,
        requests: Sequence[Request],
        outcome: Outcome,
        *,
        subject: ReportedEngine,
        load: str,
        energy: EnergyReading,
    ) -> ReportedRun:
        """The report of a run of `requests`; ValueError if it had less than two steps."""
        spans = lane_spans(self._timeline.records(), self._timeline.deliveries())
        needed = {
            request.request_id: len(request.prompt_token_ids) + times.num_tokens - 1
            for request, times in zip(requests, outcome.requests, strict=True)
        }
        report = Report(
            subject=subject,
            load=load,
            wall_s=outcome.ended_s - outcome.began_s,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
            requests=outcome.requests,
            table=self._timeline.table(),
            kv=self._contention.use(),
            work=self._waste.work(needed),
            energy=energy,
            excerpt=_excerpt(spans),
        )
        return ReportedRun(report=report, spans=spans)


def run_report(engine: Prepared, load: ReportLoad, arrivals: Sequence[Arrival], *, model: str) -> ReportedRun:
    """Warm up, then offer the `arrivals` of `load`, each time on a cache that is empty.

    `model` is what the report calls it. Raises as `run_load` does, and ValueError for a run of less than two
    steps.
    """
    config, limits = engine.config.scheduler, engine.limits

    def metered() -> MeteredLoop:
        shares_prefixes = engine.config.cache.prefix_caching
        scheduler = Scheduler(config, limits, shares_prefixes=shares_prefixes, copy_costs=engine.copy_costs)
        return MeteredLoop(scheduler, engine.executor, config=config)

    requests = load.to_run(arrivals, vocab_size=limits.vocab_size)
    for request in requests:
        limits.check(request)
    warm_up = load.warm_up(arrivals[: config.max_rows], vocab_size=limits.vocab_size)
    run_load(metered().loop, limits, warm_up)
    counted = metered()
    before = engine.energy.read()
    outcome = run_load(counted.loop, limits, requests)
    energy = engine.energy.read().since(before)
    subject = subject_of(engine, model=model)
    return counted.reported(requests, outcome, subject=subject, load=load.label, energy=energy)


def subject_of(engine: Prepared, *, model: str) -> ReportedEngine:
    """The engine as a report describes it, as of now."""
    config = engine.config
    commit = current_commit(Path(__file__).resolve().parents[2])
    software = [f"{name} {version}" for name, version in versions(("albireo-jax", "jax")).items()]
    if commit is not None:
        software.append(f"commit {commit.revision[:10]}{' with changes' if commit.dirty else ''}")
    return ReportedEngine(
        model=model,
        tp=config.parallel.tp,
        depth=config.scheduler.depth,
        sampling=config.sampling.value,
        dtype=engine.dtype.value,
        max_rows=config.scheduler.max_rows,
        max_step_tokens=config.scheduler.max_step_tokens,
        device=_device(engine),
        software=", ".join(software),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _device(engine: Prepared) -> Device:
    devices = engine.executor.program.mesh.devices.flat
    if devices[0].platform == "cpu":
        return cpu_device(virtual_devices=engine.config.parallel.virtual_devices)
    memory_bytes = int(devices[0].memory_stats()["bytes_limit"])
    return Device(kind="gpu", name=devices[0].device_kind, count=len(devices), memory_bytes=memory_bytes)


def _excerpt(spans: Sequence[LaneSpan]) -> tuple[LaneSpan, ...]:
    """The spans from the plan of a step in the middle to the commit of one a few steps later."""
    steps = max((span.step for span in spans if span.step is not None), default=0) + 1
    first = max(0, (steps - _EXCERPT_STEPS) // 2)
    chosen = [span for span in spans if span.step is not None and 0 <= span.step - first < _EXCERPT_STEPS]
    if not chosen:
        return ()
    begin_s, end_s = min(span.begin_s for span in chosen), max(span.end_s for span in chosen)
    return tuple(
        replace(span, begin_s=max(span.begin_s, begin_s), end_s=min(span.end_s, end_s))
        for span in spans
        if span.begin_s < end_s and span.end_s > begin_s
    )
