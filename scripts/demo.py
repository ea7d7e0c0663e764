"""Serve SmolLM2 over HTTP, stream one chat answer from it, and show where the time of its steps went.

What `make demo` runs. It starts `albireo serve smollm2` as a user would, on a free port, and talks to it
only through the OpenAI routes and /metrics.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import httpx
from prometheus_client.parser import text_string_to_metric_families

_START_TIMEOUT_S = 600.0
_OK = 200


def main() -> None:
    """Serve, ask, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", default="Give me three short tips for learning to play the guitar.")
    parser.add_argument("--max-tokens", type=int, default=120)
    options = parser.parse_args()
    with _server() as url, httpx.Client(base_url=url, timeout=300) as client:
        print(f"\nuser:      {options.prompt}\nassistant: ", end="", flush=True)
        started_s = time.perf_counter()
        tokens = 0
        for text in _answer(client, options.prompt, max_tokens=options.max_tokens):
            print(text, end="", flush=True)
            tokens += 1
        elapsed_s = time.perf_counter() - started_s
        print(f"\n\n{tokens} pieces of text in {elapsed_s:.1f} s, streamed over HTTP\n")
        print(_task_table(client.get("/metrics").text))


@contextmanager
def _server() -> Generator[str]:
    """URL of a running server, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "albireo_jax.cli", "serve", "smollm2", "--port", str(port)]
    command += ["--max-model-len", "1024", "--max-rows", "8", "--max-step-tokens", "256"]
    print("$ albireo " + " ".join(command[3:]), flush=True)
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with code {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/health").status_code == _OK:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"the server was not ready after {_START_TIMEOUT_S:.0f} s")


def _answer(client: httpx.Client, prompt: str, *, max_tokens: int) -> Iterator[str]:
    """Pieces of the streamed answer."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 1,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != _OK:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            text = json.loads(data)["choices"][0]["delta"].get("content")
            if text:
                yield text


def _task_table(metrics: str) -> str:
    """The step's tasks, from the Prometheus text."""
    samples = {
        (sample.name, sample.labels.get("task", "")): sample
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    steps = samples["albireo_task_window_steps", ""].value
    lines = [f"{'task':<22}{'ms per step':>14}{'exposed, ms':>14}"]
    for task in ("T1", "T2", "T3", "T4", "T5"):
        spent = samples["albireo_task_seconds", task]
        exposed = samples["albireo_task_exposed_seconds", task]
        name = f"{task} {spent.labels['name']}"
        lines.append(f"{name:<22}{1e3 * spent.value / steps:>14.3f}{1e3 * exposed.value / steps:>14.3f}")
    lines.append(f"{int(steps)} steps; exposed: the device had nothing queued meanwhile")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
