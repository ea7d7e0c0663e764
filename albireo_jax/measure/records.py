"""Records of measurements: JSON files with the command, code, versions and machine beside the raw samples.

A record is `NAME-DEVICE-DATE.json`, DATE with its minute in UTC, so that none replaces another. Every series
keeps all its samples, to six digits; medians are there for readers and can be computed again.
"""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy", "albireo-jax")
"""Distributions whose versions every record names."""

_ABSOLUTE = re.compile(r"(?<![^=:])(?:/[^/=:]+)+")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The measured device: `count` cores of a CPU, or `count` GPUs.

    `virtual_devices` above 0 says that one CPU stood for that many devices: such a record shows that a
    program works, not how fast it is on real ones. `detail` tells apart what `name` does not, for a CPU its
    family and model; `features` are the instruction sets that decide its speed.
    """

    kind: str
    name: str
    count: int
    memory_bytes: int
    virtual_devices: int = 0
    detail: str = ""
    features: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The device in a file name: `cpu-amd-epyc-2`, or `cpu-amd-epyc-2-as-8` for 8 virtual devices."""
        virtual = f"-as-{self.virtual_devices}" if self.virtual_devices else ""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{self.kind}-{name}-{self.count}{virtual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Raw samples of one metric of one subject (an engine, a task) in one case, in the order measured."""

    subject: str
    case: str
    metric: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)


class SampleTable:
    """Samples by subject, case, metric and unit, in the order in which each of these first came."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str, str, str], list[float]] = {}

    def add(self, subject: str, case: str, figures: Mapping[tuple[str, str], float]) -> None:
        """One more sample of each metric and unit of a subject in a case."""
        for (metric, unit), value in figures.items():
            self._samples.setdefault((subject, case, metric, unit), []).append(value)

    def series(self) -> list[Series]:
        """A series for each metric of each subject and case."""
        return [
            Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(samples))
            for (subject, case, metric, unit), samples in self._samples.items()
        ]


def series_by_metric(
    subject: str, case: str, samples: Mapping[tuple[str, str], Iterable[float]]
) -> list[Series]:
    """The series of a subject in a case by metric and unit; a metric without samples has none."""
    return [
        Series(subject=subject, case=case, metric=metric, unit=unit, samples=known)
        for (metric, unit), values in samples.items()
        if (known := tuple(map(float, values)))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One benchmark run, ready to be written; `settings` are the sizes it was run at.

    `load_before` is the machine's load average of one minute before the run: other work disturbs figures.
    """

    name: str
    device: Device
    settings: Mapping[str, object]
    series: Sequence[Series]
    note: str = ""
    load_before: float | None = None
    peer_versions: Mapping[str, Mapping[str, str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The code that was measured; `dirty` if tracked files differed from `revision`."""

    revision: str
    dirty: bool


def write_record(record: Record, folder: Path, *, now: datetime | None = None) -> Path:
    """Write `record` into `folder`, made where it is missing, and give the path of the file.

    Raises FileExistsError rather than replace a record of the same minute.
    """
    now = now or datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record_file_name(record.name, record.device, now=now)
    with path.open("x") as file:
        commit = current_commit(Path(__file__).resolve().parents[2])
        file.write(record_text(record_content(record, now=now, commit=commit)))
    return path


def record_file_name(name: str, device: Device, *, now: datetime) -> str:
    """Name of the file of a record that was begun `now`."""
    return f"{name}-{device.label}-{now:%Y%m%d-%H%M}.json"


def record_content(record: Record, *, now: datetime, commit: Commit | None) -> dict[str, Any]:
    """A record as it is written, with what can be found out here: the command and versions."""
    return {
        "name": record.name,
        "date": now.isoformat(timespec="seconds"),
        "command": command_line(sys.orig_argv),
        "commit": asdict(commit) if commit else None,
        "device": asdict(record.device),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "peer_versions": record.peer_versions or {},
        "load_before": record.load_before,
        "settings": dict(record.settings),
        "note": record.note,
        "series": [series_content(series) for series in record.series],
    }


def record_text(content: Mapping[str, object]) -> str:
    """The text of a record's file: lists of numbers on one line each, so that it stays readable."""
    return _compact_lists(json.dumps(content, indent=1)) + "\n"


def series_content(series: Series) -> dict[str, object]:
    """A series as it is written: samples to six digits, and their median."""
    samples = [float(f"{sample:.6g}") for sample in series.samples]
    return {**asdict(series), "samples": samples, "median": statistics.median(samples)}


def cpu_device(*, virtual_devices: int = 0) -> Device:
    """The CPU that this process may use, as the operating system names it."""
    info = _cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    return Device(
        kind="cpu",
        name=info.get("model name") or platform.processor() or platform.machine(),
        count=len(usable_cores()),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        virtual_devices=virtual_devices,
        detail=f"family {info['cpu family']} model {info['model']}" if "cpu family" in info else "",
        features=tuple(flag for flag in _CPU_FLAGS if flag in flags),
    )


def usable_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed version of each distribution; those that are not installed are left out."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def current_commit(folder: Path) -> Commit | None:
    """The commit checked out in `folder`, None where that is not a git checkout."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
    return Commit(revision=revision, dirty=dirty)


def command_line(argv: Sequence[str]) -> str:
    """`argv` as one would type it, absolute paths without their first parts: folders differ by machine."""
    return shlex.join(_ABSOLUTE.sub(lambda match: _last_parts(match.group()), word) for word in argv)


def _last_parts(path: str) -> str:
    """The last two parts of an absolute path, never its first."""
    return "/".join(path.split("/")[2:][-2:]) or path


def _compact_lists(text: str) -> str:
    number = r"-?[\d.]+(?:[eE][-+]?\d+)?"
    return re.sub(
        rf"\[\s*{number}(?:,\s*{number})*\s*\]", lambda match: " ".join(match.group().split()), text
    )


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_info() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
