"""Workers of a sweep as seen by the sweep: processes that measure the replicas of one case."""

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.measure.worker_process import WorkerProcess
from albireo_jax.sweep.replica_worker import ReplicaJob
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant

_COMMAND = (sys.executable, "-m", "albireo_jax.sweep.replica_worker")


class ReplicaProcess:
    """The process of one replica; it begins to prepare its engines when it is made.

    Every method raises WorkerEndedError if the process ended.
    """

    def __init__(self, job: ReplicaJob, *, command: Sequence[str] = _COMMAND) -> None:
        # Before JAX starts in it; no other process shares these GPUs.
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus))} if job.gpus else {}
        name = f"the worker of replica {job.replica}"
        self._worker = WorkerProcess(name, command, environment=visible)
        self._worker.send(asdict(job))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._worker.process.pid

    def ready(self) -> dict[str, Any]:
        """Wait until it is prepared; the sizes of its engines."""
        return self._worker.receive()

    def begin(self, variant: Variant, *, seed: int) -> None:
        """Start a run with the prompts of this seed; `end` waits for it."""
        self._worker.send({"variant": variant.value, "seed": seed})

    def end(self) -> ReplicaRun:
        """Wait for the run that was begun."""
        return dataclass_from_json(ReplicaRun, self._worker.receive())

    def close(self) -> None:
        """End the process, in the middle of a run if it is in one."""
        self._worker.close()


@contextmanager
def replica_processes(jobs: Sequence[ReplicaJob]) -> Generator[list[ReplicaProcess], None, None]:
    """A process for each job, all closed at the end."""
    with ExitStack() as stack:
        started: list[ReplicaProcess] = []
        for job in jobs:
            worker = ReplicaProcess(job)
            stack.callback(worker.close)
            started.append(worker)
        yield started
