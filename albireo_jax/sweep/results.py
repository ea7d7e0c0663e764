"""Results of a sweep: runs of replicas, runs of the cluster that they stand for, and their summary.

::

    ReplicaRun       a worker's answer: one variant, one repeat, one replica
    ClusterRun       the replicas of a variant and repeat together, times those that were not measured
    CaseResult       all cluster runs of a case: what a file of the output folder holds
    VariantFigures   medians and spreads of a variant at a degree, over its repeats
    Summary          all figures with t_e, the rule 4M/C and the settings: what a page or a table shows
    Sweep            the case results, and the summary that follows from them
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.core.model_files import find_model
from albireo_jax.engine.timeline import TaskTable, TaskTime
from albireo_jax.measure.kv_contention import KvUse
from albireo_jax.measure.loads import comes_at_once
from albireo_jax.measure.records import Device
from albireo_jax.measure.throughput import percentile
from albireo_jax.sweep.cases import SweepCase, SweepPlan
from albireo_jax.sweep.sweep_settings import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRun:
    """One run of a replica's share of the load, its latencies in seconds per request.

    `energy_j` is what its GPUs took; None with a reason where nothing measures it.
    """

    seconds: float
    num_tokens: int
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    table: TaskTable
    kv: KvUse
    energy_j: float | None
    energy_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRun:
    """One run of a variant over the cluster.

    `output_tokens_per_s` is the cluster's; `replica_tokens_per_s` are those of the replicas that were
    measured, whose requests the latencies are of, whose steps `table` adds up, and whose worst and mean pages
    `kv` gives. Times per output token are None if no request had a second one.
    """

    variant: Variant
    repeat: int
    output_tokens_per_s: float
    replica_tokens_per_s: tuple[float, ...]
    num_requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    table: TaskTable
    kv: KvUse
    energy_j_per_token: float | None
    energy_reason: str = ""

    def task_s(self, name: str, *, exposed: bool) -> float:
        """Seconds per step of the task whose name begins so (T1 … T5), or those of them that were exposed."""
        (task,) = (task for task in self.table.tasks if task.name.startswith(name))
        return (task.exposed_s if exposed else task.total_s) / max(self.table.steps, 1)


def cluster_run(
    case: SweepCase, variant: Variant, repeat: int, *, replicas: Sequence[ReplicaRun]
) -> ClusterRun:
    """The measured replicas of a case together, standing for all of the cluster's."""
    rates = tuple(run.num_tokens / run.seconds for run in replicas)
    ttft_s = [seconds for run in replicas for seconds in run.ttft_s]
    tpot_s = [seconds for run in replicas for seconds in run.tpot_s]
    energies = [run.energy_j for run in replicas if run.energy_j is not None]
    known = len(energies) == len(replicas)
    return ClusterRun(
        variant=variant,
        repeat=repeat,
        output_tokens_per_s=sum(rates) * case.num_replicas / case.measured_replicas,
        replica_tokens_per_s=rates,
        num_requests=len(ttft_s),
        ttft_p50_s=percentile(ttft_s, 0.5),
        ttft_p99_s=percentile(ttft_s, 0.99),
        tpot_p50_s=percentile(tpot_s, 0.5) if tpot_s else None,
        tpot_p99_s=percentile(tpot_s, 0.99) if tpot_s else None,
        table=_add_tables([run.table for run in replicas]),
        kv=_add_uses([run.kv for run in replicas]),
        energy_j_per_token=sum(energies) / sum(run.num_tokens for run in replicas) if known else None,
        energy_reason=next((run.energy_reason for run in replicas if run.energy_reason), ""),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """The counted runs of a case, in the order measured; `settings_hash` tells of what settings."""

    case: SweepCase
    settings_hash: str
    date: str
    revision: str | None
    num_pages: int
    page_bytes: int
    weight_bytes: int
    dtype: str
    runs: tuple[ClusterRun, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `how` is there for readers."""
        return {**asdict(self), "how": self.case.how}

    @classmethod
    def from_json(cls, content: object) -> "CaseResult":
        """The result that `to_json` wrote; raises ValueError for what it did not write."""
        if not isinstance(content, dict):
            raise ValueError(f"expected a case, got {content!r:.80}")
        return dataclass_from_json(cls, {name: value for name, value in content.items() if name != "how"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some repeats, and the least and the most."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantFigures:
    """A variant at a degree over its repeats; None is what was not, or cannot be, measured.

    `gain` is over the synchronous variant at the same degree, from the throughputs of the same repeats.
    Task times are medians in seconds per step by T1 … T5, `between_s` what the device idled between them.
    Pages are shares of those of a replica; `waited_for_pages_s` is per request.
    """

    tp: int
    variant: Variant
    how: str
    replicas: str
    output_tokens_per_s: Spread
    per_gpu_tokens_per_s: float
    gain: Spread | None
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: Spread | None
    tpot_p99_s: float | None
    idle_share: float
    step_s: float
    spent_s: dict[str, float]
    exposed_s: dict[str, float]
    between_s: float
    num_pages: int
    kv_peak_share: float
    kv_mean_share: float
    preemptions: float
    waited_for_pages_s: float
    waited_for_rows_s: float
    energy_j_per_token: float | None
    energy_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A case without a result, and why: the end of what its worker said."""

    case: SweepCase
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The findings of a sweep, for readers: pages and tables show nothing else.

    `at_once`: all requests were there from the start. `how` is in short what `how` of the figures says in
    full. `t_e` has the degree of the highest median throughput of the cluster for each variant; `rule_value`
    is 4M/C and `rule_tp` that rounded up to a power of two, None where the memory of a GPU is not known.
    `failures` has what went wrong by case.
    """

    model: str
    gpus: int
    load: str
    at_once: bool
    device: Device
    how: str
    dtype: str
    settings: dict[str, str]
    load_before: float
    weight_bytes: int
    gpu_memory_bytes: int | None
    rule_value: float | None
    rule_tp: int | None
    t_e: dict[str, int]
    figures: tuple[VariantFigures, ...]
    failures: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All results of a sweep, by degree, variants in the order of the ablation."""

    plan: SweepPlan
    device: Device
    load_before: float
    results: tuple[CaseResult, ...]
    failures: tuple[Failure, ...]

    def summary(self) -> Summary:
        """The summary of the results."""
        plan, figures = self.plan, self.figures()
        return Summary(
            model=find_model(plan.settings.model).name,
            gpus=plan.settings.gpus,
            load=plan.settings.load.label,
            at_once=comes_at_once(plan.settings.load),
            device=self.device,
            how=plan.settings.how,
            dtype=plan.dtype.value,
            settings=plan.settings.described(),
            load_before=self.load_before,
            weight_bytes=plan.rule.weight_bytes,
            gpu_memory_bytes=plan.rule.gpu_memory_bytes,
            rule_value=plan.rule.value,
            rule_tp=plan.rule.tp,
            t_e=best_degrees(figures),
            figures=tuple(figures),
            failures={failure.case.name: failure.error for failure in self.failures},
        )

    def figures(self) -> list[VariantFigures]:
        """One for each degree and variant that was measured."""
        by_key = {
            (result.case.tp, variant): (result, [run for run in result.runs if run.variant is variant])
            for result in self.results
            for variant in result.case.variants
        }
        found: list[VariantFigures] = []
        for (tp, _), (result, runs) in by_key.items():
            base = by_key.get((tp, Variant.SYNCHRONOUS), (result, []))[1]
            found.append(_figures(result.case, runs, base=base))
        return found


def best_degrees(figures: Sequence[VariantFigures]) -> dict[str, int]:
    """t_e: the degree of the highest median throughput, for each variant; the first of equals."""
    best: dict[str, VariantFigures] = {}
    for one in figures:
        known = best.get(one.variant.value)
        if known is None or one.output_tokens_per_s.median > known.output_tokens_per_s.median:
            best[one.variant.value] = one
    return {variant: one.tp for variant, one in best.items()}


def _figures(case: SweepCase, runs: Sequence[ClusterRun], *, base: Sequence[ClusterRun]) -> VariantFigures:
    def median(value: Callable[[ClusterRun], float]) -> float:
        return statistics.median(map(value, runs))

    def maybe(value: Callable[[ClusterRun], float | None]) -> Spread | None:
        known = [found for run in runs if (found := value(run)) is not None]
        return _spread(known) if len(known) == len(runs) else None

    def per_step(*, exposed: bool) -> dict[str, float]:
        names = [task.name for task in runs[0].table.tasks]
        return {name: median(lambda run, name=name: run.task_s(name, exposed=exposed)) for name in names}

    tpot_p99, energy = maybe(lambda run: run.tpot_p99_s), maybe(lambda run: run.energy_j_per_token)
    throughput = _spread([run.output_tokens_per_s for run in runs])
    gains = [
        run.output_tokens_per_s / other.output_tokens_per_s for run, other in zip(runs, base, strict=False)
    ]
    return VariantFigures(
        tp=case.tp,
        variant=runs[0].variant,
        how=case.how,
        replicas=case.replicas,
        output_tokens_per_s=throughput,
        per_gpu_tokens_per_s=throughput.median / (case.tp * case.num_replicas),
        gain=_spread(gains) if gains else None,
        ttft_p50_s=median(lambda run: run.ttft_p50_s),
        ttft_p99_s=median(lambda run: run.ttft_p99_s),
        tpot_p50_s=maybe(lambda run: run.tpot_p50_s),
        tpot_p99_s=tpot_p99.median if tpot_p99 else None,
        idle_share=median(lambda run: run.table.idle_share),
        step_s=median(lambda run: (run.table.wall_s - run.table.no_work_s) / max(run.table.steps, 1)),
        spent_s=per_step(exposed=False),
        exposed_s=per_step(exposed=True),
        between_s=median(lambda run: run.table.between_s / max(run.table.steps, 1)),
        num_pages=runs[0].kv.num_pages,
        kv_peak_share=median(lambda run: run.kv.peak_pages / run.kv.num_pages),
        kv_mean_share=median(lambda run: run.kv.mean_pages / run.kv.num_pages),
        preemptions=median(lambda run: run.kv.preemptions),
        waited_for_pages_s=median(lambda run: run.kv.waited_for_pages_s / run.num_requests),
        waited_for_rows_s=median(lambda run: run.kv.waited_for_rows_s / run.num_requests),
        energy_j_per_token=energy.median if energy else None,
        energy_reason=runs[0].energy_reason,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def _add_tables(tables: Sequence[TaskTable]) -> TaskTable:
    return TaskTable(
        steps=sum(table.steps for table in tables),
        wall_s=sum(table.wall_s for table in tables),
        device_busy_s=sum(table.device_busy_s for table in tables),
        no_work_s=sum(table.no_work_s for table in tables),
        between_s=sum(table.between_s for table in tables),
        tasks=tuple(_add_times(tasks) for tasks in zip(*(table.tasks for table in tables), strict=True)),
        copies=_add_times([table.copies for table in tables]),
    )


def _add_times(times: Sequence[TaskTime]) -> TaskTime:
    return TaskTime(
        name=times[0].name,
        total_s=sum(time.total_s for time in times),
        exposed_s=sum(time.exposed_s for time in times),
        on_device=times[0].on_device,
    )


def _add_uses(uses: Sequence[KvUse]) -> KvUse:
    return KvUse(
        num_pages=uses[0].num_pages,
        peak_pages=max(use.peak_pages for use in uses),
        mean_pages=statistics.fmean(use.mean_pages for use in uses),
        preemptions=sum(use.preemptions for use in uses),
        waited_for_tokens_s=sum(use.waited_for_tokens_s for use in uses),
        waited_for_rows_s=sum(use.waited_for_rows_s for use in uses),
        waited_for_pages_s=sum(use.waited_for_pages_s for use in uses),
    )
