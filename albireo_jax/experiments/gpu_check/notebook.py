"""What one part of the check measured so far: written after every figure, as the part may be cut off."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from albireo_jax.experiments.records import Series
from albireo_jax.experiments.restoring import restore

RUNNING, DONE, SKIPPED, FAILED = "running", "done", "skipped", "failed"
"""How a part stands; one that was cut off is still RUNNING when all is over."""


class PartSkipped(Exception):  # noqa: N818
    """A part has nothing to do here, for the reason that it gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """A part's figures, what of it was left out and why, and how it stands after so many seconds."""

    part: str
    status: str = RUNNING
    reason: str = ""
    seconds: float = 0.0
    left_out: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()
    peer_versions: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])


class Notebook:
    """Takes a part's figures and keeps them in `folder`; tells how much of its time is left.

    Time counts from when the notebook is opened, on `clock`.
    """

    def __init__(
        self, part: str, folder: Path, *, deadline_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._part = part
        self._path = _file(folder, part)
        self._deadline_s = deadline_s
        self._clock = clock
        self._began_s = clock()
        self._series: list[Series] = []
        self._left_out: list[str] = []
        self._peers: dict[str, dict[str, str]] = {}
        self._write(RUNNING)

    def add(self, subject: str, case: str, *, metric: str, unit: str, samples: Iterable[float]) -> None:
        """Keep the samples of a figure."""
        self.extend([Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(samples))])

    def extend(self, series: Iterable[Series]) -> None:
        """Keep figures that are series already."""
        self._series += series
        self._write(RUNNING)

    def leave_out(self, what: str, why: str) -> None:
        """Say aloud, and keep, that something is not measured."""
        self._left_out.append(f"{what}: {why}")
        print(f"LEFT OUT {what}: {why}", flush=True)  # noqa: T201
        self._write(RUNNING)

    def add_peer(self, name: str, versions: Mapping[str, str]) -> None:
        """Keep the versions of what we are compared with."""
        self._peers[name] = dict(versions)

    def has_time(self, what: str) -> bool:
        """Whether `what` may still be begun; it is left out otherwise."""
        has_time = self._clock() - self._began_s < self._deadline_s
        if not has_time:
            self.leave_out(what, f"the part's {self._deadline_s:.0f} s are over")
        return has_time

    def close(self, status: str, reason: str = "") -> None:
        """The part is over."""
        self._write(status, reason)

    def _write(self, status: str, reason: str = "") -> None:
        notes = Notes(
            part=self._part,
            status=status,
            reason=reason,
            seconds=self._clock() - self._began_s,
            left_out=tuple(self._left_out),
            series=tuple(self._series),
            peer_versions=self._peers,
        )
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(asdict(notes)))
        new.replace(self._path)


def read_notes(folder: Path, part: str) -> Notes:
    """What the notebook of a part says; that it failed, if it was never opened."""
    path = _file(folder, part)
    if not path.is_file():
        return Notes(part=part, status=FAILED, reason="it ended before it began")
    return restore(Notes, json.loads(path.read_text()))


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"
