"""Workers of a sweep as seen by the sweep: processes that measure the replicas of one case."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from albireo_jax.core.errors import AlbireoError
from albireo_jax.measure.dataclass_json import restore
from albireo_jax.sweep.replica_worker import Job
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant

_COMMAND = (sys.executable, "-m", "albireo_jax.sweep.replica_worker")
_TAIL_CHARACTERS = 2000


class WorkerError(AlbireoError):
    """A worker ended before it answered; the message ends with what it said last."""


class Worker:
    """One process; it begins to prepare its engines when it is made."""

    def __init__(self, job: Job, *, command: Sequence[str] = _COMMAND) -> None:
        self.job = job
        # A file, not a pipe: nobody reads it while the worker works, and a full pipe would stop it.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        # Before JAX starts in it; no other process shares these GPUs.
        visible = ("env", f"CUDA_VISIBLE_DEVICES={','.join(map(str, job.gpus))}") if job.gpus else ()
        self._process = subprocess.Popen(
            (*visible, *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self._send(asdict(job))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """Wait until it is prepared; the sizes of its engines."""
        return self._receive()

    def begin(self, variant: Variant, *, seed: int) -> None:
        """Start a run with the prompts of this seed; `end` waits for it."""
        self._send({"variant": variant.value, "seed": seed})

    def end(self) -> ReplicaRun:
        """Wait for the run that was begun."""
        return restore(ReplicaRun, self._receive())

    def close(self) -> None:
        """End the process, in the middle of a run if it is in one."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _send(self, content: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> WorkerError:
        code = self._process.wait()
        self._said.seek(0)
        tail = self._said.read().decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
        return WorkerError(f"the worker of replica {self.job.replica} ended with code {code}: {tail}")


@contextmanager
def workers(jobs: Sequence[Job]) -> Generator[list[Worker], None, None]:
    """A worker for each job, all closed at the end."""
    with ExitStack() as stack:
        started: list[Worker] = []
        for job in jobs:
            worker = Worker(job)
            stack.callback(worker.close)
            started.append(worker)
        yield started
