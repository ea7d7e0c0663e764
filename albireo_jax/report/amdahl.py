"""The Amdahl report of a run: where the time of its steps went, and what more devices would bring.

Of the time in which there was work, only the forward pass T3 shrinks with the tensor-parallel degree. Its
share is P, and with k times as many devices Amdahl's law predicts a step that is 1 / ((1 - P) + P / k) times
as fast. What is hidden behind T3 no longer counts among the rest, so overlap raises P::

    time with work = T3 + T4 + waits for page copies + exposed T1, T2, T5 + between tasks
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.engine.energy import EnergyReading
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.measure.kv_contention import KvUse
from albireo_jax.measure.records import Device
from albireo_jax.measure.throughput import percentile
from albireo_jax.report.perfetto_trace import LaneSpan
from albireo_jax.report.wasted_tokens import TokenWork
from albireo_jax.sim.outcome import RequestTimes

_DERIVED = "derived"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedEngine:
    """The engine that was measured, on `device`, by which `software` and when."""

    model: str
    tp: int
    depth: int
    sampling: str
    dtype: str
    max_rows: int
    max_step_tokens: int
    device: Device
    software: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Amdahl:
    """The law on a task table: P, and predicted speed-ups, none of them measured.

    `hidden` is that of the same devices if nothing were exposed.
    """

    scalable_share: float
    hidden_scalable_share: float
    hidden: float

    def at(self, times: float) -> float:
        """Speed-up with `times` as many devices, the rest as exposed as it is."""
        return 1 / ((1 - self.scalable_share) + self.scalable_share / times)

    def hidden_at(self, times: float) -> float:
        """Speed-up with `times` as many devices and nothing exposed: only T4 does not shrink."""
        share = self.hidden_scalable_share
        return self.hidden / ((1 - share) + share / times)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePart:
    """One of the parts that the time with work consists of."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run of an engine under a load.

    `wall_s` is the run's, from its start to its last output, `table` covers it from the end of the first step
    on. `excerpt` has the spans of a few steps from its middle. Raises ValueError for a run of so few steps
    that there is nothing to divide.
    """

    subject: ReportedEngine
    load: str
    wall_s: float
    prompt_tokens: int
    requests: tuple[RequestTimes, ...]
    table: TaskTable
    kv: KvUse
    work: TokenWork
    energy: EnergyReading
    excerpt: tuple[LaneSpan, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a run without steps."""
        if self.table.steps < 1:
            raise ValueError(
                "the run has fewer than 2 steps, so no time to divide: ask for more requests or tokens"
            )

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(request.num_tokens for request in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of the run."""
        return self.output_tokens / self.wall_s

    @property
    def ttft_s(self) -> tuple[float, ...]:
        """Time to the first token of each request."""
        return tuple(request.ttft_s for request in self.requests)

    @property
    def tpot_s(self) -> tuple[float, ...]:
        """Time per output token of each request that has more than one."""
        return tuple(request.tpot_s for request in self.requests if request.tpot_s is not None)

    @property
    def joules_per_token(self) -> float | None:
        """Energy over generated tokens; None where it is not known."""
        return None if self.energy.joules is None else self.energy.joules / self.output_tokens

    @property
    def joules_per_request(self) -> float | None:
        """Energy over requests; None where it is not known."""
        return None if self.energy.joules is None else self.energy.joules / len(self.requests)


def amdahl(table: TaskTable) -> Amdahl:
    """The law on a table of at least one step.

    A table on which the devices took no measurable time predicts nothing: all its speed-ups are 1.
    """
    t3_s, t4_s = (_total_s(table, name) for name in ("T3", "T4"))
    if not t3_s + t4_s:
        return Amdahl(scalable_share=0.0, hidden_scalable_share=0.0, hidden=1.0)
    with_work_s = table.wall_s - table.no_work_s
    return Amdahl(
        scalable_share=t3_s / with_work_s,
        hidden_scalable_share=t3_s / (t3_s + t4_s),
        hidden=with_work_s / (t3_s + t4_s),
    )


def parts(table: TaskTable) -> list[TimePart]:
    """The parts of the time with work: the device's tasks, then what was exposed."""
    device = [TimePart(name=task.name, seconds=task.total_s) for task in table.tasks if task.on_device]
    exposed = [
        TimePart(name=f"{task.name}, exposed", seconds=task.exposed_s)
        for task in (*table.tasks, table.copies)
        if not task.on_device
    ]
    return [*device, *exposed, TimePart(name="between tasks, exposed", seconds=max(table.between_s, 0.0))]


def to_json(report: Report) -> str:
    """The report and, under `derived`, what is computed from it for readers."""
    return json.dumps(content(report), indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """The report that `to_json` wrote; ValueError for any other text."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"not a report: {text!r:.80}")
    return dataclass_from_json(Report, {key: value for key, value in found.items() if key != _DERIVED})


def read_report(path: Path) -> Report:
    """The report in a file; ValueError that names it if it cannot be read."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a report that can be read: {error}") from error


def content(report: Report) -> dict[str, object]:
    """The content that `to_json` writes."""
    return {**asdict(report), _DERIVED: _derived(report)}


def _derived(report: Report) -> Mapping[str, object]:
    law, steps = amdahl(report.table), report.table.steps
    return {
        "output_tokens_per_s": report.output_tokens_per_s,
        "scalable_share": law.scalable_share,
        "predicted_speedup": {
            "at 2t": law.at(2),
            "at 4t": law.at(4),
            "nothing exposed": law.hidden,
            "at 2t, nothing exposed": law.hidden_at(2),
            "at 4t, nothing exposed": law.hidden_at(4),
        },
        "idle_share": report.table.idle_share,
        "us_per_step": {part.name: 1e6 * part.seconds / steps for part in parts(report.table)},
        "ttft_s": percentiles(report.ttft_s),
        "tpot_s": percentiles(report.tpot_s),
        "wasted_share": report.work.wasted / report.work.computed,
        "joules_per_token": report.joules_per_token,
        "joules_per_request": report.joules_per_request,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, p90 and p99; nothing of no values."""
    return {name: percentile(values, share) for name, share in _SHARES.items()} if values else {}


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def _total_s(table: TaskTable, name: str) -> float:
    (task,) = (task for task in table.tasks if task.name.startswith(name))
    return task.total_s
