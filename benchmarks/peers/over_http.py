"""Serving over HTTP beside vLLM for CPU: both servers under one client, `vllm bench serve`, in one run.

Both servers are loaded and take turns (the other is suspended), float32 and then bfloat16. The client shares
the cores with the server that is measured, so figures are only comparable within a record.

    python benchmarks/peers/make_bench_model.py MODELS
    python benchmarks/peers/over_http.py --models MODELS --peer-python vllm=VENV/bin/python
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from benchmarks.lib.compare import (
    Server,
    WorkerCommand,
    comparison_table,
    measure_in_turns,
    packages_of,
    parse_peers,
    preload_names,
    vllm_environment,
)

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
SERVED_NAME = "bench"
UNITS = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "ms",
    "median_tpot_ms": "ms",
    "p99_itl_ms": "ms",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="folder of make_bench_model.py")
    parser.add_argument("--size", default="llama60m")
    parser.add_argument("--peer-python", action="append", default=[], metavar="vllm=PATH")
    parser.add_argument("--vllm-preload", metavar="A.so:B.so", help="libraries for vLLM to load first")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests per client: concurrency times this")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def server_command(
    name: str, python: str, port: int, *, dtype: str, options: argparse.Namespace
) -> list[str]:
    """`albireo serve` or `vllm serve`, with the same model, name, length limit and dtype."""
    launchers = {"albireo": [python, "-m", "albireo_jax.cli"], "vllm": [str(Path(python).with_name("vllm"))]}
    max_model_len = options.input_len + options.output_len + 32  # decoded and encoded again, prompts grow
    command = [*launchers[name], "serve", str(options.models / f"{options.size}-{dtype}")]
    command += ["--host", HOST, "--port", str(port), "--dtype", dtype, "--served-model-name", SERVED_NAME]
    command += ["--max-model-len", str(max_model_len)]
    return command if name == "albireo" else [*command, "--no-enable-prefix-caching"]


def client_command(
    vllm: str, url: str, concurrency: int, *, dtype: str, options: argparse.Namespace
) -> list[str]:
    """`vllm bench serve` against `url`, its result written to result.json where it runs."""
    command = [str(Path(vllm).with_name("vllm")), "bench", "serve", "--backend", "openai"]
    command += ["--base-url", url, "--endpoint", "/v1/completions", "--model", SERVED_NAME]
    command += ["--tokenizer", str((options.models / f"{options.size}-{dtype}").resolve())]
    command += ["--dataset-name", "random", "--random-input-len", str(options.input_len)]
    command += ["--random-output-len", str(options.output_len), "--ignore-eos", "--temperature", "0"]
    command += ["--num-prompts", str(max(8, concurrency * options.rounds)), "--num-warmups", "4"]
    command += ["--max-concurrency", str(concurrency), "--save-result", "--result-filename", "result.json"]
    return command


def load(server: Server, command: list[str]) -> dict[str, float]:
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


def measure_all(
    dtype: str, pythons: dict[str, str], options: argparse.Namespace, *, logs: Path
) -> list[Series]:
    """All concurrencies of one dtype against both servers in turns."""
    cases = {f"{dtype} {count} clients": count for count in options.concurrency}
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
    environments = {"vllm": {**vllm_environment(options.vllm_preload), **memory}}
    with ExitStack() as stack:
        servers, urls = {}, {}
        for name, python in pythons.items():
            port = free_port()
            urls[name] = f"http://{HOST}:{port}"
            command = WorkerCommand(
                name=name,
                command=server_command(name, python, port, dtype=dtype, options=options),
                log=logs / f"{name}-{dtype}.log",
                environment=environments.get(name, {}),
            )
            servers[name] = stack.enter_context(Server(command, health_url=f"{urls[name]}/health"))

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
    options = arguments()
    load_before = os.getloadavg()[0]
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
    record = Record(
        name="peers-http",
        device=cpu_device(),
        settings={
            key: str(value)
            for key, value in vars(options).items()
            if key not in ("models", "output", "peer_python", "vllm_preload")
        }
        | {"vllm_preload": preload_names(options.vllm_preload)},
        series=series,
        note="One client, `vllm bench serve`, on the same cores as the server; streamed completions, greedy.",
        load_before=load_before,
        peer_versions={"vllm": packages_of(peers["vllm"], ["vllm-cpu", "torch"])},
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
