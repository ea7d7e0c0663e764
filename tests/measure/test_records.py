"""A record holds what is needed to repeat and to doubt a measurement."""

import json
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from albireo_jax.measure.records import (
    Device,
    Record,
    Series,
    command_line,
    cpu_device,
    current_commit,
    versions,
    write_record,
)

GPU = Device(kind="gpu", name="NVIDIA H100 80GB HBM3", count=1, memory_bytes=80 * 2**30)
SAMPLES = (3.0, 1.0, 2.5e-7, 100.0, 2.0)
NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


def record(device: Device = GPU) -> Record:
    series = Series(subject="albireo", case="16 requests", metric="decode", unit="tokens/s", samples=SAMPLES)
    return Record(name="peers", device=device, settings={"input_len": 128}, series=[series], load_before=0.5)


def test_record_is_complete(tmp_path: Path):
    path = write_record(record(), tmp_path / "new" / "folder", now=NOW)
    assert path.name == "peers-gpu-nvidia-h100-80gb-hbm3-1-20260304-0506.json"
    content = json.loads(path.read_text())
    assert content["date"] == "2026-03-04T05:06:07+00:00"
    assert content["settings"] == {"input_len": 128}
    assert content["device"]["name"] == GPU.name
    assert content["load_before"] == 0.5
    assert {"python", "jax", "jaxlib"} <= content["versions"].keys()
    assert "python" in content["command"] or "pytest" in content["command"]
    (series,) = content["series"]
    assert tuple(series["samples"]) == SAMPLES
    assert series["median"] == statistics.median(SAMPLES)


def test_no_record_is_replaced(tmp_path: Path):
    first = write_record(record(), tmp_path, now=NOW)
    before = first.read_text()
    with pytest.raises(FileExistsError):
        write_record(record(), tmp_path, now=NOW)
    assert first.read_text() == before


def test_samples_of_a_series_are_on_one_line(tmp_path: Path):
    text = write_record(record(), tmp_path, now=NOW).read_text()
    assert re.search(r'"samples": \[ 3\.0, 1\.0, 2\.5e-07, 100\.0, 2\.0 \]', text)


def test_virtual_devices_are_told_apart():
    real, virtual = cpu_device(), cpu_device(virtual_devices=8)
    assert real.label != virtual.label
    assert virtual.label.endswith("-as-8")
    assert real.count >= 1
    assert real.memory_bytes > 2**28


def test_commands_name_no_folder_of_this_machine():
    words = [
        "/home/a/b/.venv/bin/python",
        "scripts/x.py",
        "--peer",
        "vllm=/opt/c/d/vllm/bin/python",
        "--n",
        "3",
    ]
    line = command_line([*words, "/data/models/llama60m", "../data/a/b/c", "/tmp/out"])
    assert line == "bin/python scripts/x.py --peer vllm=bin/python --n 3 models/llama60m ../data/a/b/c out"


def test_commit_follows_the_checkout(tmp_path: Path):
    assert current_commit(tmp_path) is None
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "start"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = current_commit(tmp_path)
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit.revision)
    assert not commit.dirty
    (tmp_path / "file").write_text("new")
    subprocess.run(["git", "-C", str(tmp_path), "add", "file"], check=True)
    changed = current_commit(tmp_path)
    assert changed is not None
    assert changed.dirty


def test_versions_leave_out_what_is_missing():
    assert versions(["numpy", "no-such-distribution-here"]).keys() == {"numpy"}


def test_records_need_no_jax():
    program = "import sys, albireo_jax.measure.records; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
