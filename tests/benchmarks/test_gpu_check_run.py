"""A run of the GPU check as processes: limits, failures, kills, and what is packed and handed on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from albireo_jax.measure.records import Commit
from benchmarks.gpu_check import carried, machine, prepared
from benchmarks.gpu_check.check_parts import CheckPart, CheckRun
from benchmarks.gpu_check.part_figures import PartFigures
from benchmarks.gpu_check.part_settings import PartSettings
from benchmarks.gpu_check.record_file import (
    CUT_OFF,
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Notes,
    RecordFile,
)
from benchmarks.gpu_check.runner import RESERVE_S, Runner

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
PARTS = f"""#!{sys.executable}
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu_check.part_figures import PartFigures
from benchmarks.gpu_check.record_file import RecordFile
from benchmarks.gpu_check.part_settings import read_settings
name, settings, limit_s, began_s = sys.argv[3:]
record = RecordFile.read(Path(read_settings(Path(settings)).record))
figures = PartFigures(name, record, limit_s=float(limit_s), began_s=float(began_s))
figures.add("s", "c", metric="m", unit="1", samples=[1.0])
if name == "sleeps":
    time.sleep(60)
if name == "dies":
    sys.exit("no such kernel")
if name == "writes":
    for number in range(10**6):
        figures.add("s", str(number), metric="m", unit="1", samples=[number])
figures.close("done")
"""
"""Stands for the Python of a run: parts that end well, never, badly, or write without end."""


def part(name: str, *, limit_s: float = 5.0, least_s: float = 0.1) -> CheckPart:
    return CheckPart(name=name, title=name, limit_s=limit_s, least_s=least_s, shown=())


def runner_of(folder: Path, *parts: CheckPart, total_s: float = 60.0) -> Runner:
    python = folder / "python"
    python.write_text(PARTS)
    python.chmod(0o755)
    record, settings = folder / "out" / "record.json", folder / "settings.json"
    RecordFile.create(record, {"peer_versions": {}}, parts=[each.name for each in parts])
    PartSettings(
        small=True, on_cpu=True, data=None, output="", record=str(record), carried="", peers={}
    ).write(settings)
    return Runner(
        run=CheckRun(name="run", title="", total_s=total_s + RESERVE_S, parts=parts),
        python=str(python),
        settings=settings,
        record=record,
        log=folder / "out" / "record.log",
        began_s=time.monotonic(),
        after_part=lambda _: None,
    )


def test_no_part_stops_the_next_and_all_keep_what_they_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = (part("dies"), part("sleeps", limit_s=8.0), part("ends"), part("long", least_s=1000))
    runner = runner_of(tmp_path, *parts)
    runner.run_parts()
    record = RecordFile.read(runner.record)
    found = [record.notes(each.name) for each in parts]
    assert [each.status for each in found] == [FAILED, CUT_OFF, DONE, WAITING]
    assert [len(each.series) for each in found] == [1, 1, 1, 0]
    assert "its process ended with 1" in found[0].reason
    assert "at its limit of 8 s" in found[1].reason
    assert "it takes 1000 s" in found[3].reason
    assert "no such kernel" in capfd.readouterr().out  # the end of the log of a part that failed
    assert time.monotonic() - runner.began_s < 40


def test_a_run_ends_in_its_time_whatever_its_parts_do(tmp_path: Path) -> None:
    runner = runner_of(tmp_path, part("sleeps", limit_s=50), part("ends", least_s=2), total_s=7)
    runner.run_parts()
    assert time.monotonic() - runner.began_s < 7 + RESERVE_S
    record = RecordFile.read(runner.record)
    assert [record.notes(name).status for name in ("sleeps", "ends")] == [CUT_OFF, WAITING]


def test_a_part_killed_at_any_moment_leaves_a_whole_record(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        runner = runner_of(folder, part("writes"))
        command = [runner.python, "-m", "_", "writes", str(runner.settings), "60", str(time.monotonic())]
        process = subprocess.Popen(command)
        wait_for(lambda: len(RecordFile.read(runner.record).notes("writes").series) > 0)  # noqa: B023
        time.sleep(draw.random() / 4)
        process.kill()
        process.wait()
        notes = RecordFile.read(runner.record).notes("writes")
        assert notes.status == RUNNING
        assert [each.case for each in notes.series[1:]] == [str(n) for n in range(len(notes.series) - 1)]


def test_a_killed_check_leaves_its_figures_and_no_process(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--small", "--only", "device", "--output", str(tmp_path)]
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "right", *options, "--python", sys.executable], start_new_session=True
    )
    try:
        wait_for(lambda: "copy bandwidth" in text_of(tmp_path))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not parts_of(tmp_path))
    record = json.loads(text_of(tmp_path))
    assert record["parts"]["device"]["status"] in (RUNNING, DONE)
    assert record["series"]
    assert record["versions"]["jax"]


def wait_for(happened: Callable[[], bool], *, limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def text_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.json"))


def parts_of(folder: Path) -> list[str]:
    """Commands of parts whose log is open in this folder."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in os.readlink(process / "fd" / "1"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_figures_are_read_as_they_were_noted(tmp_path: Path) -> None:
    now_s = [100.0]
    record = RecordFile.create(tmp_path / "r.json", {"peer_versions": {}}, parts=("decode", "prefill"))
    figures = PartFigures("decode", record, limit_s=10.0, began_s=98.0, clock=lambda: now_s[0])
    figures.add("s", "c", metric="step", unit="ms", samples=[1.0, 3.0])
    with figures.attempt("the middle"):
        raise RuntimeError("first line\nsecond line")
    assert figures.has_time("the next")
    now_s[0] = 107.0
    assert not figures.has_time("the last")
    notes = RecordFile.read(record.path).notes("decode")
    assert (notes.status, notes.seconds) == (RUNNING, 9.0)
    assert notes.left_out[0] == "the middle: FAILED: RuntimeError: first line"
    assert notes.left_out[1].startswith("the last: 0 of the part's 8 s are left")
    assert "second line" in notes.trace
    assert notes.series[0].samples == (1.0, 3.0)
    figures.close(DONE)
    assert record.notes("decode").status == FAILED
    assert RecordFile.read(record.path).notes("prefill") == Notes(part="prefill")
    with pytest.raises(FileExistsError):
        RecordFile.create(record.path, {}, parts=())


def test_what_is_handed_on_comes_back_tuned_products_first(tmp_path: Path) -> None:
    folder, home = tmp_path / "carried", tmp_path / "home"
    files = {
        folder / "form.json": b"{}",
        folder / "hlo" / "decode.txt.gz": bytes(50),
        home / ".cache" / "x" / "autotune_cache" / "a": bytes(300),
        home / ".cache" / "x" / "small": bytes(100),
        home / ".cache" / "x" / "large": bytes(900),
        home / "elsewhere": bytes(1),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    carried.pack(tmp_path / "a.tar.gz", folder=folder, home=home, max_bytes=500)
    there = tmp_path / "there"
    carried.unpack(tmp_path / "a.tar.gz", folder=there / "carried", home=there / "home")
    got = {path.relative_to(there) for path in there.rglob("*") if path.is_file()}
    wanted = {path.relative_to(tmp_path) for path in files if path.name not in ("large", "elsewhere")}
    assert got == wanted


def test_a_prepared_folder_says_what_code_it_was_made_for(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prepared.Wanted(packages=(), python="3.12")
    size = prepared.prepare_folder(tmp_path / "made", data=data_dir, wanted=wanted)
    assert 10**6 < size < prepared.MAX_BYTES
    assert (tmp_path / "made" / prepared.DATA / "models" / "stories260k").is_dir()
    source = prepared.read_source(tmp_path / "made")
    assert source is not None
    assert source.digest == machine.digest_here()
    commit = source.commit or Commit(revision="a", dirty=False)
    source = machine.Source(commit=commit, version=source.version, digest=source.digest)
    assert prepared.read_source(tmp_path) is None
    monkeypatch.setattr(machine, "current_commit", lambda _: None)  # as where no .git is
    assert machine.commit_of(source) == commit
    monkeypatch.setattr(machine, "digest_here", lambda: "changed")
    assert machine.commit_of(source) == Commit(revision=commit.revision, dirty=True)
    assert machine.commit_of(None) is None
    with pytest.raises(ValueError, match="has no models"):
        prepared.prepare_folder(tmp_path / "made", data=tmp_path, wanted=wanted)


def test_what_is_to_travel_need_not_be_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = prepared.missing_packages()
    assert all("==" in each for each in here)

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(prepared, "version", none)
    assert prepared.missing_packages() == ("gguf>=0.17", "llguidance>=1.9,<2")
