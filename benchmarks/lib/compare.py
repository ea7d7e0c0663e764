"""Engines side by side: each in a process of its own, one awake at a time, measured in turns.

::

    this process          worker "albireo"       worker "vllm"        (a module of benchmarks.peers.workers,
      ask  --question-->   awake, answers         suspended            each with the Python of its own venv)
      ask  -------------------------------------> awake, answers
                           suspended

Engines that wait may spin on a core (thread pools, shared-memory queues), so all but the one that is asked
are suspended. Repeats are the outermost loop and the order of the engines turns with them, so a machine that
slows down slows all of them.
"""

import subprocess
import time
import urllib.request
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from albireo_jax.measure.records import SampleTable, Series, usable_cores
from albireo_jax.measure.worker_process import WorkerEndedError, WorkerProcess, with_environment
from benchmarks.lib.recording import script_parser

_LOG_TAIL = 2_000
_SUSPEND_S = 10.0
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCommand:
    """How to start a process: `command` with `environment` added to ours; it prints to the file `log`."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


class ProcessTree:
    """A process started by us with all its descendants: suspended, resumed and ended together.

    They are ended at the end of a `with` block.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._root = psutil.Process(process.pid)

    def suspend(self) -> None:
        """Stop all of them where they are, the root first; on return they have stopped."""
        members = self._members()
        for process in members:
            process.suspend()
        deadline_s = time.monotonic() + _SUSPEND_S
        while any(process.status() not in _STOPPED for process in members):
            if time.monotonic() > deadline_s:
                raise WorkerEndedError(f"process {self._process.pid} or a child does not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        """Let all of them go on."""
        for process in reversed(self._members()):
            process.resume()

    @contextmanager
    def awake(self) -> Generator[None]:
        """Let all of them run inside this `with` block only."""
        self.resume()
        try:
            yield
        finally:
            self.suspend()

    def close(self) -> None:
        """End all of them, by force those that are still there after ten seconds."""
        members = self._members()
        for process in members:
            _unless_gone(process.resume)
            _unless_gone(process.terminate)
        _, alive = psutil.wait_procs(members, timeout=10)
        for process in alive:
            _unless_gone(process.kill)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _members(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class PeerWorker(ProcessTree):
    """A process that answers questions, one JSON object a line; suspended except while it is asked.

    The first line that it writes, once it has loaded, is `hello`: an object with its versions.
    """

    def __init__(self, command: PeerCommand) -> None:
        self.name = command.name
        command.log.parent.mkdir(parents=True, exist_ok=True)
        self._worker = WorkerProcess(
            command.name, command.command, environment=command.environment, log=command.log
        )
        super().__init__(self._worker.process)
        self.hello = self._answer()
        self.suspend()

    def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """The worker's answer, all cores its own meanwhile. Raises WorkerEndedError if it ends instead."""
        with self.awake():
            self._worker.send(question)
            return self._answer()

    def close(self) -> None:
        """End the process and its descendants."""
        super().close()
        self._worker.close()

    def _answer(self) -> dict[str, Any]:
        try:
            return self._worker.receive()
        except WorkerEndedError:
            self.close()
            raise


class PeerServer(ProcessTree):
    """A process that serves HTTP; suspended except inside `awake`.

    Made when `health_url` answers 200; raises WorkerEndedError if the process ends first, or needs longer
    than `timeout_s`.
    """

    def __init__(self, command: PeerCommand, *, health_url: str, timeout_s: float = 600.0) -> None:
        self.name = command.name
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("w") as log:
            process = subprocess.Popen(
                with_environment(command.command, command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        super().__init__(process)
        deadline_s = time.monotonic() + timeout_s
        while not _answers(health_url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                self.close()
                tail = command.log.read_text(errors="replace")[-_LOG_TAIL:]
                raise WorkerEndedError(f"{command.name} ended; its log {command.log} ends with:\n{tail}")
            time.sleep(0.5)
        self.suspend()


Measure = Callable[[str, str, int], Mapping[str, float]]
"""(subject, case, repeat) -> metric -> value."""


def measure_in_turns(
    subjects: Sequence[str], cases: Iterable[str], *, repeats: int, units: Mapping[str, str], measure: Measure
) -> list[Series]:
    """`repeats` samples of every subject in every case, the order of subjects turned by one each time."""
    table = SampleTable()
    cases = list(cases)
    for repeat in range(repeats):
        first = repeat % len(subjects)
        for case in cases:
            for subject in (*subjects[first:], *subjects[:first]):
                figures = measure(subject, case, repeat)
                table.add(subject, case, {(metric, units[metric]): v for metric, v in figures.items()})
    return sorted(table.series(), key=lambda one: (one.subject, one.case, one.metric))


def comparison_table(series: Sequence[Series], *, metric: str, ours: str) -> str:
    """Medians of `metric` (smallest … largest sample) by case and subject, and the ratio ours / peer."""
    chosen = [one for one in series if one.metric == metric]
    if not chosen:
        raise ValueError(f"no samples of {metric!r}, there are {sorted({one.metric for one in series})}")
    medians = {(one.case, one.subject): one.median for one in chosen}
    lines = [
        f"{metric} ({chosen[0].unit})",
        f"{'case':<28}{'subject':<16}{'median':>12}{'range':>24}{'ours/it':>9}",
    ]
    for one in sorted(chosen, key=lambda one: (_natural(one.case), one.subject != ours, one.subject)):
        spread = f"{min(one.samples):,.4g} … {max(one.samples):,.4g}"
        mine = medians.get((one.case, ours))
        ratio = f"{mine / one.median:.2f}" if mine is not None and one.subject != ours else ""
        lines.append(f"{one.case:<28}{one.subject:<16}{one.median:>12,.4g}{spread:>24}{ratio:>9}")
    return "\n".join(lines)


def peer_parser(doc: str | None) -> ArgumentParser:
    """A script's parser with the options of comparisons that generate text."""
    made = script_parser(doc)
    made.add_argument("--models", type=Path, required=True, help="folder of make_bench_model")
    made.add_argument("--size", default="llama60m")
    made.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    made.add_argument("--vllm-preload", metavar="A.so:B.so", help="libraries for vLLM to load first")
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    made.add_argument("--input-len", type=int, default=128)
    made.add_argument("--output-len", type=int, default=128)
    made.add_argument("--repeats", type=int, default=5)
    return made


def peer_settings(options: Namespace) -> dict[str, object]:
    """Settings of a record in place of these options: none names a folder."""
    libraries = (options.vllm_preload or "").split(":")
    names = [Path(library).name for library in libraries if library]
    return {"models": None, "peer_python": None, "vllm_preload": names}


def parse_peers(options: Iterable[str], *, known: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` options as a mapping from peer to what runs it. Raises ValueError for a bad one."""
    peers: dict[str, str] = {}
    for option in options:
        name, _, path = option.partition("=")
        if name not in known:
            raise ValueError(f"unknown peer {name!r}, known are {list(known)}")
        if not Path(path).is_file():
            raise ValueError(f"no program for {name} at {path!r}")
        peers[name] = path
    return peers


def vllm_environment(preload: str | None) -> dict[str, str]:
    """Variables for vLLM on a CPU: no downloads, all our cores, and libraries to load first (`a.so:b.so`).

    Without `preload` vLLM chooses by itself, which is PyTorch's OpenMP and no other allocator.
    """
    cores = ",".join(map(str, usable_cores()))
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return environment | ({"LD_PRELOAD": preload} if preload else {})


def packages_of(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages` in the environment of the interpreter `python`."""
    program = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", program, *packages], check=True, capture_output=True, text=True)
    return dict(zip(packages, done.stdout.split(), strict=True))


def _natural(case: str) -> list[tuple[int, str]]:
    """Sorts `16 requests` behind `2 requests`."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in case.split()]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _unless_gone(signal: Callable[[], None]) -> None:
    try:
        signal()
    except psutil.NoSuchProcess:
        return
