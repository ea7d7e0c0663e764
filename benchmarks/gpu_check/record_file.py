"""The record of a run that is still going on: whole and readable at any moment, whatever ends the run.

::

    the run ──creates──▶ NAME-DEVICE-DATE.json ◀──replaces, figure by figure── the part that runs

One process writes at a time: a part while it runs, the run between two parts. Each writes a new file and
moves it over the old one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.measure.records import Series, record_text, series_content

WAITING, RUNNING, DONE, SKIPPED, FAILED, CUT_OFF = (
    "not begun",
    "running",
    "done",
    "skipped",
    "failed",
    "cut off",
)
"""The states of a part. One that runs when all is over was ended with the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """A part's figures, what of it was left out and why, and how it stands after so many seconds.

    `limit_s` is the time it was given. `trace` is the end of the Python traceback of one that failed.
    """

    part: str
    status: str = WAITING
    reason: str = ""
    trace: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    left_out: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()
    peer_versions: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])


class RecordFile:
    """A record on disk and what stands in it."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content = content

    @classmethod
    def create(cls, path: Path, content: dict[str, Any], *, parts: Sequence[str]) -> Self:
        """Write a record without figures, in a folder that is made where it is missing.

        Raises FileExistsError rather than replace a record.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        made = cls(path, {**content, "parts": {}, "series": []})
        for part in parts:
            made.put(Notes(part=part))
        return made

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record as it stands."""
        return cls(path, json.loads(path.read_text()))

    def put(self, notes: Notes) -> None:
        """Replace all that is written of a part."""
        begins = f"{notes.part}: "
        kept = [each for each in self._content["series"] if not each["subject"].startswith(begins)]
        own = [series_content(replace(each, subject=begins + each.subject)) for each in notes.series]
        self._content["series"] = kept + own
        self._content["peer_versions"] |= notes.peer_versions
        facts = asdict(replace(notes, series=(), seconds=round(notes.seconds, 1)))
        facts["left_out"] = list(notes.left_out)
        for name in ("part", "series", "peer_versions"):
            del facts[name]
        self._content["parts"][notes.part] = facts
        self._write()

    def notes(self, part: str) -> Notes:
        """The lines that are written of a part."""
        begins = f"{part}: "
        series = [
            {name: value for name, value in each.items() if name != "median"}
            | {"subject": each["subject"].removeprefix(begins)}
            for each in self._content["series"]
            if each["subject"].startswith(begins)
        ]
        return dataclass_from_json(
            Notes,
            {"part": part, **self._content["parts"][part], "series": series, "peer_versions": {}},
        )

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(record_text(self._content))
        new.replace(self.path)
