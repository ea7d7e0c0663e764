"""Checks and measures the engine on a machine with one GPU, in two calls that need no network.

Where there is a network, once; what is made here travels with the checkout:

    scripts/gpu_check.sh prepare --data DATA

On the machine with the GPU:

    scripts/gpu_check.sh right --output OUT       is it right, and in which form is the step quickest?
    scripts/gpu_check.sh fast --output OUT        how fast is it in that form?
    scripts/gpu_check.sh more --output OUT        other models, KV copies, tables for the planner

Results are written to OUT after every figure: a record, a log, and an archive that `right` hands on to
`fast`. Where these are two machines of one kind, put OUT/carried.tar.gz into the prepared folder.

    scripts/gpu_check.sh right --only golden,forms --stretch 2            two parts, with twice their time
    scripts/gpu_check.sh fast --only peers --stretch 5 --peer vllm=PYTHON --peer llama.cpp=SERVER
    scripts/gpu_check.sh right --device cpu --small                       tiny sizes, without a GPU

Exits with 1 if a part failed or was cut off, or if something is wrong; goals of speed that are missed are
only told.
"""

import argparse
import json
import os
import signal
import site
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from albireo_jax.measure.records import Record, record_content, record_file_name
from benchmarks.gpu_check import carried, prepared
from benchmarks.gpu_check.check_parts import PEERS, RUNS, TRANSFORMERS, CheckRun, chosen
from benchmarks.gpu_check.machine import (
    ROOT,
    commit_of,
    device_here,
    package_versions,
)
from benchmarks.gpu_check.part_settings import PartSettings
from benchmarks.gpu_check.record_file import RecordFile
from benchmarks.gpu_check.runner import Runner
from benchmarks.gpu_check.verdicts import CPU_NOTE, NOTE, is_good, table

BEGAN_S = time.monotonic()
_CPU_STRETCH = 5.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    for run in RUNS.values():
        _add_run_options(commands.add_parser(run.name, help=run.title, epilog=_parts_text(run)))
    making = commands.add_parser("prepare", help="make the folder that travels with the checkout")
    making.add_argument("--data", type=Path, required=True, help="folder of real models and traces")
    making.add_argument("--for-python", default="3.12", help="Python of that machine")
    making.add_argument(
        "--package",
        action="append",
        metavar="NAME==VERSION",
        help="a package that it lacks, instead of the usual",
    )
    for each in commands.choices.values():
        each.add_argument("--prepared", type=Path, default=ROOT / "gpu-check", help="the folder that travels")
        each.add_argument("--python", default=sys.executable, help="the interpreter that runs everything")
    return made


def _add_run_options(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results"
    )
    made.add_argument("--only", metavar="PART,PART", help="these parts, not all")
    made.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    made.add_argument("--small", action="store_true", help="tiny models and few cases, to try everything")
    made.add_argument(
        "--stretch", type=float, help="times as long for every part and for all; by default 1, or 5 on a CPU"
    )
    made.add_argument("--data", type=Path, help="folder of real data; by default that of the prepared folder")
    made.add_argument(
        "--carried",
        type=Path,
        help="archive of an earlier run; by default that of the output or prepared folder, for `right` none",
    )
    made.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PROGRAM",
        help="an engine to compare with: transformers=PYTHON (by default this Python), "
        "llama.cpp=LLAMA_SERVER, vllm=PYTHON",
    )


def _parts_text(run: CheckRun) -> str:
    return "parts: " + "; ".join(f"{part.name} ({part.title}, {part.limit_s:g} s)" for part in run.parts)


def named_peers(words: list[str]) -> dict[str, str]:
    """Peers of the options and their programs; raises ValueError for one that is not known or not there."""
    if not words:  # plans are made by Python's own library alone
        return {}
    from benchmarks.lib.compare import parse_peers

    return parse_peers(words, known=PEERS)


def check(options: argparse.Namespace, run: CheckRun) -> int:
    """Run the parts, print the table and keep the results."""
    with tempfile.TemporaryDirectory() as work:
        home, folder = _folders(options, run, Path(work))
        settings, file = _settings(options, run, folder), Path(work) / "settings.json"
        settings.write(file)
        archive = options.output / carried.ARCHIVE
        runner = Runner(
            run=run,
            python=options.python,
            settings=file,
            record=Path(settings.record),
            log=Path(settings.record).with_suffix(".log"),
            began_s=BEGAN_S,
            after_part=lambda _: carried.pack(archive, folder=folder, home=home),
        )
        try:
            runner.run_parts()
        finally:
            record = RecordFile.read(Path(settings.record))
            notes = [record.notes(part.name) for part in run.parts]
            print(table(run.parts, notes, on_cpu=settings.on_cpu))
            print(f"{settings.record}, {time.monotonic() - BEGAN_S:.0f} of {run.total_s:g} s", flush=True)
    return 0 if is_good(notes, on_cpu=settings.on_cpu) else 1


def _folders(options: argparse.Namespace, run: CheckRun, work: Path) -> tuple[Path, Path]:
    """A home for the parts and the folder of what is handed on, with what an earlier run left in both.

    The home is the run's own, so that a start is cold unless something was handed on.
    """
    home, folder, packages = work / "home", work / "carried", work / "site"
    for each in (home, folder / carried.HLO):
        each.mkdir(parents=True)
    usual = (options.output / carried.ARCHIVE, options.prepared / carried.ARCHIVE)
    for archive in (*(usual if run.is_carried_to else ()), options.carried):
        if archive is not None and archive.is_file():
            carried.unpack(archive, folder=folder, home=home)
    prepared.unpack_wheels(options.prepared / prepared.WHEELS, packages)
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # which is in the home that was
    os.environ["HOME"] = str(home)
    os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', ROOT)}:{packages}"
    return home, folder


def _settings(options: argparse.Namespace, run: CheckRun, folder: Path) -> PartSettings:
    """The settings of the parts; the record is there when it returns."""
    on_cpu = options.device == "cpu"
    data = options.data or options.prepared / prepared.DATA
    return PartSettings(
        small=options.small,
        on_cpu=on_cpu,
        data=str(data) if data.is_dir() else None,
        output=str(options.output),
        record=str(_new_record(options, run, folder)),
        carried=str(folder),
        peers=options.peers,
    )


def _carried_form(folder: Path) -> dict[str, object] | None:
    """The form of the step that an earlier run found best, None where there was none."""
    path = folder / carried.FORM
    return json.loads(path.read_text()) if path.is_file() else None


def _new_record(options: argparse.Namespace, run: CheckRun, folder: Path) -> Path:
    on_cpu = options.device == "cpu"
    now, source = datetime.now(UTC), prepared.read_source(options.prepared)
    device, commit = device_here(on_cpu=on_cpu), commit_of(source)
    record = Record(
        name=f"gpu-check-{run.name}",
        device=device,
        settings={
            "small": options.small,
            "stretch": options.stretch,
            "only": options.only,
            "total_s": run.total_s,
            "form": _carried_form(folder),
        },
        series=[],
        note=f"{CPU_NOTE} {NOTE}" if on_cpu else NOTE,
        load_before=os.getloadavg()[0],
    )
    content = record_content(record, now=now, commit=commit)
    content["versions"] |= package_versions() | ({"albireo-jax": source.version} if source else {})
    path = options.output / record_file_name(record.name, device, now=now)
    RecordFile.create(path, content, parts=[part.name for part in run.parts])
    return path


def make(options: argparse.Namespace) -> int:
    """Make the folder that travels."""
    packages = options.package or prepared.missing_packages()
    wanted = prepared.Wanted(packages=packages, python=options.for_python)
    size = prepared.prepare_folder(options.prepared, data=options.data, wanted=wanted)
    print(f"{options.prepared}: {size / 1e6:.1f} MB with {', '.join(packages)}")
    return 0


def _ended(number: int, _: FrameType | None) -> None:
    """Told to end: the part is ended too, and what there is of the table is printed."""
    raise SystemExit(128 + number)


def main() -> int:
    made = parser()
    options = made.parse_args()
    try:
        if options.command == "prepare":
            return make(options)
        if options.stretch is None:
            options.stretch = _CPU_STRETCH if options.device == "cpu" else 1.0
        options.peers = {TRANSFORMERS: options.python, **named_peers(options.peer)}
        run = chosen(RUNS[options.command], only=options.only, stretch=options.stretch)
    except ValueError as error:
        made.error(str(error))
    signal.signal(signal.SIGTERM, _ended)
    return check(options, run)


if __name__ == "__main__":
    sys.exit(main())
