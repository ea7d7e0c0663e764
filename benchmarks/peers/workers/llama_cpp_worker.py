"""Generates with llama.cpp's server: random weights of a shape, answers of many lengths.

The model is a GGUF file, written here from a configuration. Requests share one pool of keys and values, as
large as they need together.
"""

from albireo_jax.measure.worker_channel import WorkerChannel
from benchmarks.peers.workers.worker_options import worker_parser

CHANNEL = WorkerChannel()  # before the server starts: its log goes to stderr

import json  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import urllib.error  # noqa: E402
import urllib.request  # noqa: E402
from argparse import Namespace  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402
from time import perf_counter, sleep  # noqa: E402
from typing import Any  # noqa: E402

from albireo_jax.core.config import Dtype  # noqa: E402
from albireo_jax.core.hf_config import read_hf_config  # noqa: E402
from benchmarks.peers.workers.random_gguf import write_random_gguf  # noqa: E402

MARGIN_TOKENS = 64  # that the server may keep of a request beyond its last token
STEP_TOKENS = 2048


def server_command(options: Namespace, model: Path, port: int) -> list[str]:
    """llama-server with all layers on the device, one slot for each request, one pool for all."""
    slots = options.max_requests
    return [
        *(str(options.server), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--parallel", str(slots), "--kv-unified", "--cache-ram", "0", "--no-ui"),
        *("--ctx-size", str(options.max_tokens + slots * MARGIN_TOKENS)),
        *("--batch-size", str(STEP_TOKENS), "--ubatch-size", str(STEP_TOKENS)),
        *("--gpu-layers", "0" if options.device == "cpu" else "999", "--flash-attn", "on"),
        *("--cache-type-k", "f16", "--cache-type-v", "f16"),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once the server has loaded the model; raises RuntimeError if it ends instead."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            sleep(0.1)
    raise RuntimeError(f"llama-server ended with status {server.returncode} before it was ready")


def complete(url: str, prompt: list[int], length: int) -> int:
    """Tokens that the server generated for one request."""
    body = {
        "prompt": prompt,
        "n_predict": length,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)["tokens_predicted"]


def version_of(server: Path) -> str:
    done = subprocess.run([server, "--version"], check=True, capture_output=True, text=True)
    return (done.stderr + done.stdout).partition("version: ")[2].partition("\n")[0]


def main() -> None:
    parser = worker_parser(__doc__)
    parser.add_argument("--server", type=Path, required=True, help="the program llama-server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.max_requests) as clients:
        model, port = Path(folder) / "random.gguf", free_port()
        write_random_gguf(read_hf_config(options.model), model, dtype=Dtype(options.dtype))
        url = f"http://127.0.0.1:{port}"

        def answer(question: dict[str, Any]) -> dict[str, object]:
            begin = perf_counter()
            counts = clients.map(
                complete, [url] * len(question["prompts"]), question["prompts"], question["max_tokens"]
            )
            tokens = sum(counts)
            return {"seconds": perf_counter() - begin, "tokens": tokens}

        server = subprocess.Popen(server_command(options, model, port), stdin=subprocess.DEVNULL)
        try:
            wait_until_ready(server, url)
            versions = {"llama.cpp": version_of(options.server)}
            CHANNEL.serve({"versions": versions}, answer)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
