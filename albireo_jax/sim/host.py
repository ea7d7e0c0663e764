"""The host's time for its tasks of a step: T1 schedule, T2 prepare inputs, T5 process outputs.

Each task takes a fixed time, so much a row, and so much a token. Nothing here says what of it is exposed: a
simulated engine lets these seconds pass on its clock while the device runs what was queued, and its depth
decides what they cost.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from albireo_jax.core.plan import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTerms:
    """Seconds of a task of the host: of every step, of each of its rows, and of each of its tokens."""

    step_s: float = 0.0
    row_s: float = 0.0
    token_s: float = 0.0

    def __call__(self, plan: StepPlan) -> float:
        """Seconds of the task for a step."""
        return self.step_s + self.row_s * plan.num_rows + self.token_s * plan.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTerms:
    """The host's tasks, and in words where their figures come from."""

    schedule: TaskTerms
    prepare: TaskTerms
    process: TaskTerms
    source: str

    def step_s(self, plan: StepPlan) -> float:
        """Seconds of all three tasks for a step."""
        return self.schedule(plan) + self.prepare(plan) + self.process(plan)


NO_HOST = HostTerms(
    schedule=TaskTerms(), prepare=TaskTerms(), process=TaskTerms(), source="a host that takes no time"
)

OWN_HOST = HostTerms(
    schedule=TaskTerms(step_s=35.8e-6, row_s=8.1e-8),
    prepare=TaskTerms(step_s=210.6e-6, row_s=1.1e-8),
    process=TaskTerms(step_s=17.2e-6, row_s=7.3e-7),
    source=(
        "this engine's plan, pack and commit per decode step on 2 cores of an AMD EPYC (family 25 model 17), "
        "medians at 32, 128 and 512 rows fitted by a line; the call into the runtime that dispatches a step "
        "is assumed to take 200 µs, which was not measured on a GPU's host"
    ),
)
"""What ships: `host_terms` of the record host-cpu-amd-epyc-2-20261123-0339."""

VLLM_0_11_2 = HostTerms(
    schedule=TaskTerms(row_s=4e-3 / 128),
    prepare=TaskTerms(row_s=4e-3 / 128),
    process=TaskTerms(row_s=0.5e-3 / 128),
    source=(
        "vLLM 0.11.2 as arXiv 2606.01927 measured it (Qwen2.5-32B, t=4, 128 rows, H100): T1 4 ms, T2 4 ms, "
        "T5 0.5 ms exposed; assumed to be proportional to the rows of a step"
    ),
)
"""The synchronous engine that Albireo was compared with; its sampling, T4, is the device's."""

DISPATCH_S = 200e-6
"""Assumed seconds of the call that dispatches a step, where only the packing before it was measured."""


def host_terms(record: Mapping[str, Any], *, dispatch_s: float = DISPATCH_S) -> HostTerms:
    """Terms of the medians in a record of `benchmarks/host_steps.py`: a line over the rows for each task.

    The record's executor computes nothing, so `dispatch_s` stands for the call into the runtime. Raises
    ValueError for a record of something else.
    """
    if record.get("name") != "host":
        raise ValueError(f"a record of the host's work is named 'host', this one {record.get('name')!r}")
    device = record["device"]
    tasks = {metric: _line(record["series"], metric) for metric in ("plan", "pack", "commit")}
    pack = tasks["pack"]
    return HostTerms(
        schedule=tasks["plan"],
        prepare=TaskTerms(step_s=pack.step_s + dispatch_s, row_s=pack.row_s),
        process=tasks["commit"],
        source=(
            f"this engine's plan, pack and commit per decode step, measured on {device['count']} cores of "
            f"{device['name']} ({device['detail']}) at {record['date']}; the call that dispatches a step is "
            f"assumed to take {dispatch_s * 1e6:.0f} µs"
        ),
    )


def read_host_terms(path: Path) -> HostTerms:
    """`host_terms` of the record in a file; raises ValueError, naming it, if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return host_terms(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of the host's work: {error}") from error


def _line(series: Sequence[Mapping[str, Any]], metric: str) -> TaskTerms:
    """Seconds over rows, by least squares; a negative part would be noise and counts as nothing."""
    points = [
        (int(each["case"].removesuffix(" rows")), float(each["median"]))
        for each in series
        if each["metric"] == metric
    ]
    if len(points) < 2:
        raise ValueError(f"the record has {len(points)} sizes of step for {metric!r}, 2 are needed at least")
    rows, seconds = np.array(points, float).T
    row_s, step_s = np.polyfit(rows, seconds, 1)
    return TaskTerms(step_s=max(0.0, float(step_s)), row_s=max(0.0, float(row_s)))
