"""Runs the parts of a run one after the other, each as a process that is ended at its limit.

::

    total ──▶ part: a process ──figures──▶ the record in the output folder
                    │ ──what it prints──▶ the log beside it
                    ▼ (its end, its limit, or the run's)
              what the next run may use is packed into the output folder, then the next part

Uses Python's own library only.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu_check.check_parts import CheckPart, CheckRun
from benchmarks.gpu_check.part_settings import part_command
from benchmarks.gpu_check.record_file import CUT_OFF, FAILED, RUNNING, WAITING, RecordFile

RESERVE_S = 6.0
"""Seconds of a run that are not for its parts: packing, the table, and the last part's end."""

_GRACE_S = 2.0
_TAIL_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Where a run's parts are written about, and when it began on the clock of `time.monotonic`.

    `after_part` is called when a part has ended, with the run's record as it stands.
    """

    run: CheckRun
    python: str
    settings: Path
    record: Path
    log: Path
    began_s: float
    after_part: Callable[[CheckPart], None]

    def run_parts(self) -> None:
        """Run all parts for which there is time; the failure of one does not stop the next."""
        for part in self.run.parts:
            limit_s = min(part.limit_s, self._left_s())
            if limit_s < part.least_s:
                self._note(part, WAITING, f"{max(limit_s, 0):.0f} s were left, it takes {part.least_s:g} s")
            else:
                print(f"== {part.name}: {part.title}, at most {limit_s:.0f} s", flush=True)
                self._run(part, limit_s=limit_s)
            self.after_part(part)

    def _left_s(self) -> float:
        return self.began_s + self.run.total_s - RESERVE_S - time.monotonic()

    def _run(self, part: CheckPart, *, limit_s: float) -> None:
        command = part_command(
            self.python, part.name, settings=self.settings, limit_s=limit_s, began_s=time.monotonic()
        )
        with self.log.open("ab") as log:
            log.write(f"== {part.name}\n".encode())
            log.flush()
            begins_at = log.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
            try:
                ended = _wait(process, limit_s - _GRACE_S)
            finally:
                _end(process)
        self._settle(part, ended, limit_s=limit_s)
        if ended != 0:
            tail = self.log.read_bytes()[begins_at:].decode(errors="replace").splitlines()[-_TAIL_LINES:]
            print("\n".join(tail), flush=True)

    def _settle(self, part: CheckPart, ended: int | None, *, limit_s: float) -> None:
        """Say of a part that did not say itself how it ended."""
        status = RecordFile.read(self.record).notes(part.name).status
        if ended is None and status in (WAITING, RUNNING):
            self._note(part, CUT_OFF, f"at its limit of {limit_s:.0f} s")
        elif status in (WAITING, RUNNING):
            self._note(part, FAILED, f"its process ended with {ended}; the log has the reason")

    def _note(self, part: CheckPart, status: str, reason: str) -> None:
        record = RecordFile.read(self.record)
        record.put(replace(record.notes(part.name), status=status, reason=reason))
        print(f"{status.upper()} {part.name}: {reason}", flush=True)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status, None if it has not ended in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, by force if it does not go by itself."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        if _wait(process, _GRACE_S / 2) is None:
            continue
    process.wait()
