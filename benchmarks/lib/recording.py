"""The frame of every script here: its command line, and the record that it writes at its end."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from albireo_jax.measure.records import Device, Record, Series, cpu_device, write_record

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""The folder of the records that are kept."""


class Recording(NamedTuple):
    """A script that runs: its options, and the load of the machine before it."""

    options: argparse.Namespace
    load_before: float

    @classmethod
    def begin(cls, parser: argparse.ArgumentParser) -> "Recording":
        """Read the command line of this process."""
        return cls(parser.parse_args(), os.getloadavg()[0])

    def write(
        self,
        name: str,
        series: Sequence[Series],
        *,
        note: str = "",
        device: Device | None = None,
        settings: Mapping[str, object] | None = None,
        peer_versions: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Path:
        """Write the record into the folder of --output, print its path and give it.

        `device` is by default this CPU. The record has all options, paths without their folders, and
        `settings`, which win.
        """
        record = Record(
            name=name,
            device=device or cpu_device(),
            settings=options_by_name(self.options) | dict(settings or {}),
            series=series,
            note=note,
            load_before=self.load_before,
            peer_versions=peer_versions,
        )
        path = write_record(record, self.options.output)
        print(path)
        return path


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes a script by its module's docstring and has the option --output."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    return parser


def options_by_name(options: argparse.Namespace) -> dict[str, object]:
    """All options but --output, by name; paths without their folders."""
    return {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "output"
    }
