"""Engine, front ends and supervisor in processes of their own: each may end, and clients are told in time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.labs.engine_lab import CHAT_TEMPLATE, END, LIMITS, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BOUND_S = 60.0
SERVER = """
import sys
from albireo_jax.core.config import EngineConfig
from albireo_jax.serving import process_jobs, server, supervisor

folder, frontends, restarts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config, address = EngineConfig(model=folder), f"ipc://{folder}/engine"
http = process_jobs.HttpOptions(
    served_name="tiny", api_key=None, origins=("*",), tool_call_parser=None, reasoning_parser=None,
    stream_interval=1,
)
with server.bind("127.0.0.1", 0) as bound:
    plan = supervisor.ServerPlan(
        engine_command=(sys.executable, "-m", "tests.labs.sim_engine_process"),
        engine_job=process_jobs.EngineJob(config=config, address=address),
        front_end_command=(sys.executable, "-m", "albireo_jax.serving.front_end"),
        front_end_job=process_jobs.FrontEndJob(
            config=config, address=address, socket_fd=bound.fileno(), http=http
        ),
        num_front_ends=frontends,
        restarts=restarts,
    )
    print(server.address_of(bound), flush=True)
    supervisor.supervise(plan, ready=lambda _: print("ready", flush=True))
"""
ENDLESS: dict[str, Any] = {"prompt": "go", "max_tokens": 1900, "ignore_eos": True, "stream": True}


class _Server:
    """A server of a simulated engine in a folder, which holds the tokenizer."""

    def __init__(self, folder: Path, *, frontends: int = 1, restarts: int = 2) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), str(frontends), str(restarts)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def wait_ready(self) -> None:
        _wait(lambda: self.status() == 200)

    def status(self) -> int:
        """The status of /health, 0 if nobody answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    @property
    def engine_pid(self) -> int:
        return int((self.folder / "engine.pid").read_text())

    def front_end_pids(self) -> list[int]:
        command = ["pgrep", "-P", str(self.process.pid), "-f", "front_end"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def complete(self, **fields: Any) -> dict[str, Any]:
        body = {"prompt": "hi", "max_tokens": 5, "ignore_eos": True} | fields
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=BOUND_S)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def end(self) -> tuple[int, str]:
        """The exit code, and what was written to standard error; ends what does not end."""
        try:
            _, log = self.process.communicate(timeout=BOUND_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, log


def _wait(until: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not until():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with the tiny tokenizer, and no weights."""
    tokenizer = tiny_tokenizer()
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": LIMITS.vocab_size}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END, "chat_template": CHAT_TEMPLATE})
    )
    return tmp_path


@pytest.fixture
def build(folder: Path) -> Iterator[Callable[..., _Server]]:
    servers: list[_Server] = []

    def make(**options: int) -> _Server:
        servers.append(_Server(folder, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.communicate()


class _Stream(threading.Thread):
    """Reads an endless stream; its events, and when the last of them came."""

    def __init__(self, server: _Server) -> None:
        super().__init__()
        self.events: list[str] = []
        self.begun = threading.Event()
        self.ended_s = 0.0
        self._url = server.url
        self.start()
        assert self.begun.wait(BOUND_S)

    def run(self) -> None:
        try:
            with (
                httpx.Client(timeout=BOUND_S) as client,
                client.stream("POST", f"{self._url}/v1/completions", json=ENDLESS) as answer,
            ):
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.begun.set()
        except httpx.TransportError as error:
            self.events.append(f"broken: {error}")
        self.ended_s = time.monotonic()

    def error_code(self) -> str:
        """The code of the error that ended it, the only one."""
        self.join(BOUND_S)
        errors = [json.loads(event)["error"]["code"] for event in self.events if '"error"' in event]
        assert self.events[-1] == "[DONE]"
        assert len(errors) == 1
        return errors[0]


@pytest.mark.parametrize("way", ["kill", "panic"])
def test_an_engine_that_dies_ends_its_streams_and_is_restarted(
    build: Callable[..., _Server], way: str
) -> None:
    server = build()
    server.wait_ready()
    whole = server.complete(seed=1, max_tokens=30)["choices"]
    streams, dead = [_Stream(server) for _ in range(4)], server.engine_pid
    begin_s = time.monotonic()
    if way == "kill":
        os.kill(dead, signal.SIGKILL)
    else:
        (server.folder / "panic").touch()
    assert [stream.error_code() for stream in streams] == ["engine_dead"] * 4
    assert max(stream.ended_s for stream in streams) - begin_s < 1
    assert server.status() == 503
    (server.folder / "panic").unlink(missing_ok=True)
    server.wait_ready()
    assert server.engine_pid != dead
    assert server.complete(seed=1, max_tokens=30)["choices"] == whole
    server.process.terminate()
    code, log = server.end()
    assert code == 0
    assert "restart 1 of 2" in log
    assert "the engine is ready again" in log


def test_a_server_whose_engines_end_too_often_ends_with_an_error(build: Callable[..., _Server]) -> None:
    server = build(restarts=1)
    server.wait_ready()
    os.kill(server.engine_pid, signal.SIGKILL)
    _wait(lambda: server.status() == 503)
    server.wait_ready()
    os.kill(server.engine_pid, signal.SIGKILL)
    code, log = server.end()
    assert code == 1
    assert "was restarted 1 times already" in log


def test_an_engine_that_never_starts_ends_the_server_with_its_code(
    build: Callable[..., _Server], folder: Path
) -> None:
    (folder / "refuse").touch()
    assert build().end()[0] == 2


def test_a_front_end_that_dies_is_replaced_and_the_engine_goes_on(build: Callable[..., _Server]) -> None:
    server = build(frontends=2)
    server.wait_ready()
    _wait(lambda: len(server.front_end_pids()) == 2)
    engine, pids = server.engine_pid, server.front_end_pids()
    stream = _Stream(server)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    stream.join(BOUND_S)
    assert stream.events[-1].startswith("broken")
    server.wait_ready()
    assert server.engine_pid == engine
    _wait(lambda: httpx.get(f"{server.url}/load").json() == {"server_load": 0})
    server.complete()


def test_signals_stop_a_server_gently_and_then_at_once(build: Callable[..., _Server]) -> None:
    server = build()
    server.wait_ready()
    stream = _Stream(server)
    begin_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert stream.error_code() == "shutting_down"
    code, log = server.end()
    assert code == 0
    assert "Traceback" not in log
    assert time.monotonic() - begin_s < 15

    server = build()
    server.wait_ready()
    _Stream(server)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.5)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == -signal.SIGINT


def test_processes_end_when_their_supervisor_is_killed(build: Callable[..., _Server]) -> None:
    server = build()
    server.wait_ready()
    pids = [server.engine_pid, *server.front_end_pids()]
    assert len(pids) == 2
    server.process.kill()
    server.process.wait()
    _wait(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid) for pid in pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_front_ends_tell_the_totals_of_all(build: Callable[..., _Server]) -> None:
    server = build(frontends=2)
    server.wait_ready()
    _wait(lambda: len(server.front_end_pids()) == 2)
    for _ in range(20):
        server.complete(max_tokens=3)
    line = "albireo_generation_tokens_total 60.0"
    _wait(lambda: all(line in httpx.get(f"{server.url}/metrics").text for _ in range(10)))


def test_a_front_end_runs_without_jax() -> None:
    program = (
        "import sys\n"
        "for name in ('jax', 'jaxlib', 'flax', 'orbax'): sys.modules[name] = None\n"
        "import albireo_jax.serving.front_end\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=BOUND_S)
