"""The processes of a run: their commands, and the options that they are told in a JSON file."""

import ctypes
import json
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from albireo_jax.core.dataclass_json import dataclass_from_json

_PARENT_DIED = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSettings:
    """How large everything is, where data lies and where results go; folders as texts.

    `data` is None where there is no real data. `carried` is the folder that one run hands on to the next.
    `peers` are the engines that ours is compared with, and what runs each.
    """

    small: bool
    on_cpu: bool
    data: str | None
    output: str
    record: str
    carried: str
    peers: dict[str, str]

    def write(self, path: Path) -> None:
        """Write them for the parts."""
        path.write_text(json.dumps(asdict(self)))


def read_settings(path: Path) -> PartSettings:
    """The options that a run wrote."""
    return dataclass_from_json(PartSettings, json.loads(path.read_text()))


def part_command(python: str, part: str, *, settings: Path, limit_s: float, began_s: float) -> list[str]:
    """The command of a part's process; `began_s` is now, on the clock of `time.monotonic`."""
    times = [f"{limit_s:.3f}", f"{began_s:.3f}"]
    return [python, "-m", "benchmarks.gpu_check", part, str(settings), *times]


def end_with_parent() -> None:
    """Have this process killed when the one that started it ends: it must not keep the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
