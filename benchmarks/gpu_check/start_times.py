"""A cold and a warm start of the engine as it is by default, with all its sizes of steps and random weights.

A start is a process of its own that prepares the engine and says what it took. Both have the same empty home
at first, where the engine keeps its compiled programs, so that the first is cold and the second is warm.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from albireo_jax.core.config import EngineConfig
from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.measure.worker_process import with_environment
from benchmarks.gpu_check.check import LARGE, Check, new_check
from benchmarks.gpu_check.check_engines import shared_engine, start_engine, step_buckets
from benchmarks.gpu_check.part_figures import PartFigures
from benchmarks.gpu_check.part_settings import end_with_parent, read_settings
from benchmarks.gpu_check.record_file import RecordFile

_RESERVE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start as the process prints it: seconds until the engine was ready, without Python's own.

    `found` programs came from the persistent cache, `compiled` ones did not.
    """

    seconds: float
    found: int
    compiled: int


def run_start(check: Check) -> None:
    """A cold start, then a warm one if the first has ended."""
    with tempfile.TemporaryDirectory() as home:
        settings = Path(home) / "settings.json"
        check.settings.write(settings)
        for case in ("cold start", "warm start"):
            if not check.figures.has_time(case):
                return
            began_s = time.monotonic()
            try:
                start = _started(settings, home=home, limit_s=check.figures.left_s + _RESERVE_S)
            except subprocess.TimeoutExpired as error:
                check.figures.leave_out(case, f"it had not ended after {error.timeout:.0f} s")
                return
            _note(check, case, start, whole_s=time.monotonic() - began_s)


def _started(settings: Path, *, home: str, limit_s: float) -> Start:
    command = [sys.executable, "-m", "benchmarks.gpu_check.start_times", str(settings)]
    done = subprocess.run(
        with_environment(command, {"HOME": home}),
        check=False,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    if done.returncode:
        raise RuntimeError(f"a start ended with {done.returncode}: {done.stderr[-2000:]}")
    return dataclass_from_json(Start, json.loads(done.stdout.splitlines()[-1]))


def _note(check: Check, case: str, start: Start, *, whole_s: float) -> None:
    """Keep a start: `whole_s` is what a user waits for, imports and all."""
    figures = (
        ("start", "s", whole_s),
        ("start of the engine", "s", start.seconds),
        ("programs found", "1", start.found),
        ("programs compiled", "1", start.compiled),
    )
    for metric, unit, value in figures:
        check.figures.add(LARGE, case, metric=metric, unit=unit, samples=[value])


def main() -> int:
    """Start the engine in this process and print what it took."""
    end_with_parent()
    settings = read_settings(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        record = RecordFile.create(Path(folder) / "record.json", {"peer_versions": {}}, parts=("start",))
        check = new_check(settings, PartFigures("start", record, limit_s=0.0, began_s=time.monotonic()))
        if check.small:
            started = shared_engine(check, LARGE, step_buckets(check))
        else:
            started = start_engine(check, LARGE, EngineConfig(model="random"))
    start = Start(seconds=started.seconds, found=started.found, compiled=started.compiled)
    print(json.dumps(asdict(start)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
