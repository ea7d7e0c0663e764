"""The figures of one part of the check so far: written after every figure, as the part may be cut off."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from traceback import format_exception

from albireo_jax.measure.records import Series
from benchmarks.gpu_check.check_parts import begin_until_s
from benchmarks.gpu_check.record_file import FAILED, RUNNING, Notes, RecordFile

_TRACE_CHARACTERS = 3000


class PartSkipped(Exception):  # noqa: N818
    """A part has nothing to do here, for the reason that it gives."""


class PartFigures:
    """Takes a part's figures and keeps them in the record; tells how much of its time is left.

    Time counts from `began_s` on `clock`, which is when the part's process was started.
    """

    def __init__(
        self,
        part: str,
        record: RecordFile,
        *,
        limit_s: float,
        began_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._clock = clock
        self._began_s = began_s
        self._notes = Notes(part=part, status=RUNNING, limit_s=limit_s)
        self._failed: list[str] = []
        self._write()

    @property
    def left_s(self) -> float:
        """Seconds until nothing new is to be begun, less than 0 when it is too late."""
        return begin_until_s(self._notes.limit_s) - self._spent_s

    def add(self, subject: str, case: str, *, metric: str, unit: str, samples: Iterable[float]) -> None:
        """Keep the samples of a figure."""
        self.extend([Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(samples))])

    def extend(self, series: Iterable[Series]) -> None:
        """Keep figures that are series already."""
        self._write(series=(*self._notes.series, *series))

    def leave_out(self, what: str, why: str) -> None:
        """Say aloud, and keep, that something is not measured."""
        print(f"LEFT OUT {what}: {why}", flush=True)
        self._write(left_out=(*self._notes.left_out, f"{what}: {why}"))

    def add_peer(self, name: str, versions: Mapping[str, str]) -> None:
        """Keep the versions of what we are compared with."""
        self._write(peer_versions={**self._notes.peer_versions, name: dict(versions)})

    def has_time(self, what: str, *, takes_s: float = 0.0) -> bool:
        """Whether `what` may still be begun, which takes about so long; it is left out otherwise."""
        has_time = self.left_s > takes_s
        if not has_time:
            until_s = begin_until_s(self._notes.limit_s)
            self.leave_out(what, f"{max(self.left_s, 0):.0f} of the part's {until_s:.0f} s are left")
        return has_time

    @contextmanager
    def attempt(self, what: str) -> Generator[None]:
        """Do something that may fail without ending the part, which counts as failed when it is closed."""
        try:
            yield
        except PartSkipped:
            raise
        except Exception as error:  # noqa: BLE001
            self._failed.append(what)
            self._write(trace=(self._notes.trace + end_of_trace(error))[-_TRACE_CHARACTERS:])
            self.leave_out(what, f"FAILED: {first_line(error)}")

    def close(self, status: str, *, reason: str = "", error: BaseException | None = None) -> None:
        """The part is over."""
        trace = self._notes.trace
        if error is not None:
            trace, reason = trace + end_of_trace(error), reason or first_line(error)
        elif self._failed:
            status, reason = FAILED, f"failed: {', '.join(self._failed)}"
        self._write(status=status, reason=reason, trace=trace[-_TRACE_CHARACTERS:])

    @property
    def _spent_s(self) -> float:
        return self._clock() - self._began_s

    def _write(self, **changes: object) -> None:
        self._notes = replace(self._notes, seconds=self._spent_s, **changes)  # type: ignore[arg-type]
        self._record.put(self._notes)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def end_of_trace(error: BaseException) -> str:
    """The traceback of an error, its end if it is long."""
    return "".join(format_exception(error))[-_TRACE_CHARACTERS:]
