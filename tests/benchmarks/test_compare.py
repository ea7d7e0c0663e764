"""Workers answer one at a time, in turns, and leave nothing behind."""

import socket
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from albireo_jax.measure.records import Series
from albireo_jax.measure.worker_process import WorkerEndedError
from benchmarks.lib.compare import (
    PeerCommand,
    PeerServer,
    PeerWorker,
    comparison_table,
    measure_in_turns,
    parse_peers,
)

ECHO = """
import subprocess, sys
from albireo_jax.measure.worker_channel import WorkerChannel
channel = WorkerChannel()
print("an engine that prints where answers go")
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
def answer(question):
    if "die" in question:
        raise SystemExit("out of memory")
    return {"sum": sum(question["numbers"]), "child": child.pid}
channel.serve({"versions": {"echo": "1"}}, answer)
"""


@pytest.fixture
def echo(tmp_path: Path) -> PeerCommand:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    return PeerCommand(
        name="echo",
        command=[sys.executable, str(script)],
        log=tmp_path / "logs" / "echo.log",
    )


def test_worker_answers_and_what_it_prints_goes_to_its_log(echo: PeerCommand):
    with PeerWorker(echo) as worker:
        assert worker.hello == {"versions": {"echo": "1"}}
        assert [worker.ask({"numbers": [n, 2]})["sum"] for n in range(3)] == [2, 3, 4]
    assert "an engine that prints" in echo.log.read_text()


def test_worker_sleeps_between_questions_and_dies_with_its_children(echo: PeerCommand):
    with PeerWorker(echo) as worker:
        child = psutil.Process(int(str(worker.ask({"numbers": []})["child"])))
        assert child.status() == child.parent().status() == psutil.STATUS_STOPPED
    assert not child.is_running()


def test_worker_that_ends_tells_its_last_words(echo: PeerCommand):
    with PeerWorker(echo) as worker, pytest.raises(WorkerEndedError, match="out of memory"):
        worker.ask({"die": True})


def test_server_that_ends_tells_its_last_words(tmp_path: Path):
    command = PeerCommand(
        name="server", command=[sys.executable, "-c", "raise SystemExit('no port')"], log=tmp_path / "log"
    )
    with pytest.raises(WorkerEndedError, match="no port"):
        PeerServer(command, health_url="http://127.0.0.1:9/health")


def test_server_answers_only_while_awake(tmp_path: Path):
    (tmp_path / "health").write_text("ok")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = ["-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    command = PeerCommand(name="files", command=[sys.executable, *files], log=tmp_path / "log")
    url = f"http://127.0.0.1:{port}/health"
    with PeerServer(command, health_url=url, timeout_s=60) as server:
        for _ in range(2):
            with server.awake(), urllib.request.urlopen(url, timeout=30) as response:
                assert response.read() == b"ok"
            with pytest.raises(TimeoutError):
                urllib.request.urlopen(url, timeout=0.2)


def test_subjects_take_turns():
    calls: list[tuple[str, str, int]] = []

    def measure(subject: str, case: str, repeat: int) -> dict[str, float]:
        calls.append((subject, case, repeat))
        return {"speed": len(calls)}

    series = measure_in_turns(
        ["a", "b", "c"], ["1 row", "2 rows"], repeats=3, units={"speed": "x/s"}, measure=measure
    )
    assert len(calls) == len(set(calls)) == 18
    firsts = [subject for index, (subject, _, _) in enumerate(calls) if index % 3 == 0]
    assert firsts == ["a", "a", "b", "b", "c", "c"], "one subject always goes first"
    assert [(one.subject, one.case, len(one.samples)) for one in series if one.subject == "b"] == [
        ("b", "1 row", 3),
        ("b", "2 rows", 3),
    ]
    by_time = {(calls[int(value) - 1][:2]) for one in series for value in one.samples}
    assert by_time == {(one.subject, one.case) for one in series}


def speeds(subject: str, case: str, *samples: float) -> Series:
    return Series(subject=subject, case=case, metric="speed", unit="x/s", samples=samples)


def test_the_table_has_ratios():
    series = [
        speeds("ours", "16 rows", 30.0, 10.0, 20.0),
        speeds("peer", "16 rows", 10.0, 5.0, 5.0),
        speeds("ours", "2 rows", 1.0, 1.0, 1.0),
        speeds("alone", "2 rows", 4.0, 4.0, 4.0),
    ]
    lines = comparison_table(series, metric="speed", ours="ours").splitlines()
    assert [line.split()[2] for line in lines[2:]] == ["ours", "alone", "ours", "peer"]
    assert lines[3].endswith("0.25")
    assert lines[5].endswith("4.00")
    with pytest.raises(ValueError, match=r"no samples of 'speeed', there are \['speed'\]"):
        comparison_table(series, metric="speeed", ours="ours")


def test_peers_are_checked():
    assert parse_peers([f"vllm={sys.executable}"], known=["vllm"]) == {"vllm": sys.executable}
    with pytest.raises(ValueError, match="unknown peer 'vlm'"):
        parse_peers([f"vlm={sys.executable}"], known=["vllm"])
    with pytest.raises(ValueError, match="no program for vllm at '/no/where'"):
        parse_peers(["vllm=/no/where"], known=["vllm"])
