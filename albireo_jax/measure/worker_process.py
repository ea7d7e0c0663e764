"""A worker as seen by the process that measures with it; see `worker_channel`."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from albireo_jax.core.errors import AlbireoError

_TAIL_CHARACTERS = 2000


class WorkerEndedError(AlbireoError):
    """A worker ended before it answered; the message ends with what it said last."""


class WorkerProcess:
    """A process that takes and gives one JSON object a line.

    `environment` is added to ours. What it says besides goes to the file `log`, or to a temporary one.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.name = name
        # A file, not a pipe: nobody reads it while the worker works, and a full pipe would stop it.
        self._said: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115
        self.process = subprocess.Popen(
            with_environment(command, environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def send(self, content: Mapping[str, Any]) -> None:
        """Write one line; raises WorkerEndedError if nobody reads it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self) -> dict[str, Any]:
        """Wait for the next line; raises WorkerEndedError if the process ends instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._failure()
        return json.loads(line)

    def close(self) -> None:
        """End the process, in the middle of an answer if it is in one."""
        self.process.kill()
        self.process.communicate()
        self._said.close()

    def _failure(self) -> WorkerEndedError:
        code = self.process.wait()
        self._said.seek(0)
        tail = self._said.read().decode(errors="replace").strip()[-_TAIL_CHARACTERS:]
        return WorkerEndedError(f"{self.name} ended with code {code}: {tail}")


def with_environment(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A command that is run with these variables added."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    return ["env", *variables, *command] if variables else list(command)
