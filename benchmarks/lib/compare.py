"""Engines side by side: each in a process of its own, one awake at a time, measured in turns.

::

    this process          worker "albireo"       worker "vllm"        (a script in scripts/peers, each with
      ask  --question-->   awake, answers         suspended            the interpreter of its own venv)
      ask  -------------------------------------> awake, answers
                           suspended

Engines that wait may spin on a core (thread pools, shared-memory queues), so all but the one that is
asked are suspended. Repeats are the outermost loop and the order of the engines turns with them, so a
machine that slows down slows all of them.
"""

import json
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from albireo_jax.core.errors import AlbireoError
from albireo_jax.measure.records import Series, usable_cores

_LOG_TAIL = 2_000
_SUSPEND_S = 10.0
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


class WorkerError(AlbireoError):
    """A worker process ended or answered nothing; the end of its log is in the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCommand:
    """How to start a process: `command` with `environment` added to ours; it prints to the file `log`."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


class ProcessTree:
    """A process started by us with all its descendants: suspended, resumed and ended together."""

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
                raise WorkerError(f"process {self._process.pid} or a child does not stop")
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
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _members(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Worker:
    """A process that answers questions, one JSON object a line; suspended except while it is asked.

    The first line that it writes, once it has loaded, is `hello`: an object with its versions.
    """

    def __init__(self, command: WorkerCommand) -> None:
        self.name = command.name
        self._command = command
        self._process = _start(command, pipes=True)
        self._tree = ProcessTree(self._process)
        self.hello = self._answer()
        self._tree.suspend()

    def ask(self, question: Mapping[str, object]) -> dict[str, object]:
        """The worker's answer, all cores its own meanwhile. Raises WorkerError if it ends instead."""
        assert self._process.stdin is not None
        with self._tree.awake():
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def close(self) -> None:
        """End the process and its descendants."""
        self._tree.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._tree.close()
            raise WorkerError(_last_words(self._command))
        return json.loads(line)


class Server:
    """A process that serves HTTP; suspended except inside `awake`.

    Made when `health_url` answers 200; raises WorkerError if the process ends first, or needs longer than
    `timeout_s`.
    """

    def __init__(self, command: WorkerCommand, *, health_url: str, timeout_s: float = 600.0) -> None:
        self.name = command.name
        self._process = _start(command, pipes=False)
        self._tree = ProcessTree(self._process)
        deadline_s = time.monotonic() + timeout_s
        while not _answers(health_url):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._tree.close()
                raise WorkerError(_last_words(command))
            time.sleep(0.5)
        self._tree.suspend()

    def awake(self) -> AbstractContextManager[None]:
        """The server runs inside this `with` block."""
        return self._tree.awake()

    def close(self) -> None:
        """End the process and its descendants."""
        self._tree.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


Measure = Callable[[str, str, int], Mapping[str, float]]
"""(subject, case, repeat) -> metric -> value."""


def measure_in_turns(
    subjects: Sequence[str], cases: Iterable[str], *, repeats: int, units: Mapping[str, str], measure: Measure
) -> list[Series]:
    """`repeats` samples of every subject in every case, the order of subjects turned by one each time."""
    samples: dict[tuple[str, str, str], list[float]] = {}
    cases = list(cases)
    for repeat in range(repeats):
        first = repeat % len(subjects)
        for case in cases:
            for subject in (*subjects[first:], *subjects[:first]):
                for metric, value in measure(subject, case, repeat).items():
                    samples.setdefault((subject, case, metric), []).append(value)
    return [
        Series(subject=subject, case=case, metric=metric, unit=units[metric], samples=tuple(values))
        for (subject, case, metric), values in sorted(samples.items())
    ]


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


def paired_ratios(series: Sequence[Series], *, metric: str, ours: str, peer: str) -> dict[str, float]:
    """Median over the repeats of ours / peer, by case: each repeat is compared with its own neighbour."""
    by_key = {(one.case, one.subject): one.samples for one in series if one.metric == metric}
    return {
        case: statistics.median(a / b for a, b in zip(samples, by_key[case, peer], strict=True))
        for (case, subject), samples in by_key.items()
        if subject == ours and (case, peer) in by_key
    }


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
    """What vLLM for CPU is told: no downloads, all our cores, and libraries to load first (`a.so:b.so`).

    Without `preload` vLLM chooses by itself, which is PyTorch's OpenMP and no other allocator.
    """
    cores = ",".join(map(str, usable_cores()))
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return environment | ({"LD_PRELOAD": preload} if preload else {})


def preload_names(preload: str | None) -> list[str]:
    """The libraries of a `preload` without their folders, for a record."""
    return [Path(library).name for library in (preload or "").split(":") if library]


def packages_of(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of `packages` in the environment of the interpreter `python`."""
    program = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", program, *packages], check=True, capture_output=True, text=True)
    return dict(zip(packages, done.stdout.split(), strict=True))


def _natural(case: str) -> list[tuple[int, str]]:
    """Sorts `16 requests` behind `2 requests`."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in case.split()]


def _start(command: WorkerCommand, *, pipes: bool) -> subprocess.Popen[str]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = [f"{key}={value}" for key, value in command.environment.items()]
    with command.log.open("w") as log:
        return subprocess.Popen(
            ["env", *environment, *command.command],
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log,
            text=True,
        )


def _last_words(command: WorkerCommand) -> str:
    tail = command.log.read_text(errors="replace")[-_LOG_TAIL:]
    return f"{command.name} ended; its log {command.log} ends with:\n{tail}"


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
