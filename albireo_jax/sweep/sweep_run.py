"""A sweep over tensor-parallel degrees: N GPUs as N/t replicas of t, the same load, for each t and variant.

::

    settings ─▶ plan ─▶ for each case:  workers, one per measured replica (processes)
                          warm-up: every variant    │ for each repeat, each variant in turn:
                                                    │   all replicas begin together; wait for all
                        cases/NAME.json             ◀─ written whole, or not at all
             ─▶ sweep.json, sweep.html

A case whose file holds these very settings is not measured again, so a sweep that was killed goes on where
it was. Turns of the variants within a repeat change from repeat to repeat, so that none always comes first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from albireo_jax.core.model_files import find_model
from albireo_jax.measure.loads import cluster_arrivals, digest
from albireo_jax.measure.records import PACKAGES, Device, cpu_device, current_commit, versions
from albireo_jax.measure.worker_process import WorkerEndedError
from albireo_jax.models.registry import model_config
from albireo_jax.sweep.cases import SweepCase, SweepPlan, plan_sweep
from albireo_jax.sweep.devices import gpu_device, gpus_here
from albireo_jax.sweep.replica_processes import ReplicaProcess, replica_processes
from albireo_jax.sweep.replica_worker import ReplicaJob
from albireo_jax.sweep.results import (
    CaseResult,
    ClusterRun,
    Failure,
    ReplicaRun,
    Sweep,
    cluster_run,
)
from albireo_jax.sweep.sweep_settings import SweepSettings, Variant

Tell = Callable[[str], None]
"""Takes a line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    """The machine of a sweep."""

    device: Device
    gpu_memory_bytes: int | None


def check_sweep(settings: SweepSettings) -> SweepPlan:
    """The plan of a sweep; starts nothing.

    Raises ValueError for what this model, memory or machine cannot do, saying what would be possible.
    """
    model = model_config(find_model(settings.model))
    machine = _machine(settings)
    arrivals = tuple(cluster_arrivals(settings.load, gpus=settings.gpus, seed=settings.seed))
    return plan_sweep(settings, model, arrivals, device_memory_bytes=machine.gpu_memory_bytes)


def run_sweep(plan: SweepPlan, folder: Path, *, tell: Tell) -> Sweep:
    """Measure what `folder` does not hold yet; writes a file per case and gives all results.

    A case that fails is told of and left out; the others go on.
    """
    cases = folder / "cases"
    cases.mkdir(parents=True, exist_ok=True)
    device = _machine(plan.settings).device
    load_before = os.getloadavg()[0]
    results: list[CaseResult] = []
    failures: list[Failure] = []
    for number, case in enumerate(plan.cases, start=1):
        title = f"[{number}/{len(plan.cases)}] {case.name} ({case.how})"
        path = cases / f"{case.name}.json"
        wanted = settings_hash(plan, case, device=device)
        kept = read_case(path, settings_hash=wanted)
        if kept is not None:
            tell(f"{title}: already measured")
            results.append(kept)
            continue
        tell(f"{title}: preparing")
        try:
            result = _measure(plan, case, settings_hash=wanted, tell=tell)
        except WorkerEndedError as error:
            tell(f"{title}: failed: {error}")
            failures.append(Failure(case=case, error=str(error)))
            continue
        write_whole(path, json.dumps(result.to_json(), indent=1) + "\n")
        results.append(result)
    return Sweep(
        plan=plan,
        device=device,
        load_before=load_before,
        results=tuple(results),
        failures=tuple(failures),
    )


def settings_hash(plan: SweepPlan, case: SweepCase, *, device: Device) -> str:
    """A digest of all that could change the figures of a case, but the code itself."""
    settings = plan.settings
    content = {
        "case": asdict(case),
        "model": str(find_model(settings.model).path.resolve()),
        "dtype": plan.dtype,
        "arrivals": digest(plan.arrivals),
        "repeats": settings.repeats,
        "warmups": settings.warmups,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "device": device.label,
        "versions": versions(PACKAGES),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_case(path: Path, *, settings_hash: str) -> CaseResult | None:
    """The result in a file, None if there is none or it is of other settings or another form."""
    try:
        result = CaseResult.from_json(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
    return result if result.settings_hash == settings_hash else None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _measure(plan: SweepPlan, case: SweepCase, *, settings_hash: str, tell: Tell) -> CaseResult:
    settings = plan.settings
    with replica_processes(_jobs(plan, case)) as started:
        sizes, *_ = [worker.ready() for worker in started]
        for warmup in range(settings.warmups):
            for variant in case.variants:
                _run(started, variant, seed=settings.seed + settings.repeats + warmup)
        runs: list[ClusterRun] = []
        for repeat in range(settings.repeats):
            for variant in _turned(case.variants, repeat):
                replicas = _run(started, variant, seed=settings.seed + repeat)
                run = cluster_run(case, variant, repeat, replicas=replicas)
                tell(
                    f"{case.name} repeat {repeat + 1}/{settings.repeats} {variant.value}: "
                    f"{run.output_tokens_per_s:,.1f} tokens/s ({case.how})"
                )
                runs.append(run)
    commit = current_commit(Path(__file__).resolve().parents[2])
    return CaseResult(
        case=case,
        settings_hash=settings_hash,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        revision=commit.revision if commit else None,
        num_pages=sizes["num_pages"],
        page_bytes=sizes["page_bytes"],
        weight_bytes=sizes["weight_bytes"],
        dtype=sizes["dtype"],
        runs=tuple(runs),
    )


def _jobs(plan: SweepPlan, case: SweepCase) -> list[ReplicaJob]:
    settings = plan.settings
    return [
        ReplicaJob(
            model=settings.model,
            dtype=plan.dtype,
            case=case,
            replica=replica,
            gpus=() if case.virtual else tuple(range(replica * case.tp, (replica + 1) * case.tp)),
            arrivals=plan.arrivals,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        for replica in range(case.measured_replicas)
    ]


def _run(started: Sequence[ReplicaProcess], variant: Variant, *, seed: int) -> list[ReplicaRun]:
    """All replicas at once."""
    for worker in started:
        worker.begin(variant, seed=seed)
    return [worker.end() for worker in started]


def _turned(variants: tuple[Variant, ...], repeat: int) -> tuple[Variant, ...]:
    """The variants, another one first at each repeat."""
    first = repeat % len(variants)
    return variants[first:] + variants[:first]


def _machine(settings: SweepSettings) -> _Machine:
    """The devices of a sweep; raises ValueError if there are too few."""
    if settings.virtual_devices:
        return _Machine(device=cpu_device(virtual_devices=settings.virtual_devices), gpu_memory_bytes=None)
    here = gpus_here()
    needed = max(settings.degrees) if settings.one_replica else settings.gpus
    if len(here) < needed:
        less = "" if settings.one_replica else ", --one-replica needs no more than the largest tp"
        raise ValueError(
            f"the sweep needs {needed} GPUs, this machine has {len(here)}: --virtual-devices {needed} lets "
            f"the CPU stand for them{less}"
        )
    return _Machine(
        device=gpu_device(here[:needed]), gpu_memory_bytes=min(gpu.memory_bytes for gpu in here[:needed])
    )
