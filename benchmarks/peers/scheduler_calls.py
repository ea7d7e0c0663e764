"""Scheduling beside vLLM's: plan + commit here, schedule + update_from_output there, in one run.

Both schedulers hold the same number of requests in steady decode and run without a device, each in a
process of its own and in turns. Ours runs twice: in this environment, and in vLLM's (only NumPy is
needed), so that both are also compared on one Python. Ours always caches prefixes. vLLM's variants are its
defaults, with steps in flight (`async`, the default on accelerators) and one after the other (`sync`, its
choice on CPUs), both without prefix caching, and `async` with it. Both freeze the garbage collector as
their servers do, before there are requests.

    python -m benchmarks.peers.scheduler_calls --peer-python vllm=VENV/bin/python --model FOLDER
"""

import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from albireo_jax.measure.records import Series
from benchmarks.lib.compare import (
    PeerCommand,
    PeerWorker,
    comparison_table,
    measure_in_turns,
    parse_peers,
)
from benchmarks.lib.recording import Recording, script_parser

WORKERS = "benchmarks.peers.workers"
UNITS = {"plan": "µs", "commit": "µs", "plan + commit": "µs"}
VARIANTS: dict[str, dict[str, Any]] = {
    "vllm sync": {"worker": "vllm", "depth": 1, "block_size": 16, "prefix_caching": False},
    "vllm async": {"worker": "vllm", "depth": 2, "block_size": 16, "prefix_caching": False},
    "vllm async, prefix caching": {"worker": "vllm", "depth": 2, "block_size": 16, "prefix_caching": True},
    "albireo": {"worker": "albireo", "depth": 2},
    "albireo in vllm's Python": {"worker": "albireo in vllm's Python", "depth": 2},
}


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("--peer-python", action="append", default=[], metavar="vllm=PATH")
    made.add_argument("--model", required=True, help="model folder, for vLLM's configuration only")
    made.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    made.add_argument("--steps", type=int, default=300, help="decode steps timed per repeat")
    made.add_argument("--warmup", type=int, default=50)
    made.add_argument("--prompt-len", type=int, default=128)
    made.add_argument("--repeats", type=int, default=5)
    return made


def commands(peers: dict[str, str], model: str, logs: Path) -> list[PeerCommand]:
    """Our worker, and in vLLM's environment, if there is one, vLLM's and ours again."""
    ours = ["-m", f"{WORKERS}.albireo_scheduler_worker"]
    found = [PeerCommand(name="albireo", command=[sys.executable, *ours], log=logs / "albireo.log")]
    if "vllm" in peers:
        theirs = [peers["vllm"], "-m", f"{WORKERS}.vllm_scheduler_worker", "--model", model]
        offline = {"HF_HUB_OFFLINE": "1"}
        found += [
            PeerCommand(name="vllm", command=theirs, log=logs / "vllm.log", environment=offline),
            PeerCommand(
                name="albireo in vllm's Python",
                command=[peers["vllm"], *ours],
                log=logs / "albireo-in-vllm.log",
            ),
        ]
    return found


def measure_all(workers: dict[str, PeerWorker], options: Namespace) -> list[Series]:
    """Medians over the steps, in microseconds, of every variant whose worker is there."""
    common = {"steps": options.steps, "warmup": options.warmup, "prompt_len": options.prompt_len}

    def measure(subject: str, case: str, repeat: int) -> dict[str, float]:
        variant = VARIANTS[subject]
        question = {**variant, **common, "rows": int(case.split()[0])}
        answer = workers[variant["worker"]].ask(question)
        plan, commit = answer["plan_s"], answer["commit_s"]
        both = [sum(pair) for pair in zip(plan, commit, strict=True)]
        print(f"repeat {repeat}: {subject}, {case}: {statistics.median(both) * 1e6:.0f} µs", flush=True)
        columns = zip(UNITS, (plan, commit, both), strict=True)
        return {metric: statistics.median(values) * 1e6 for metric, values in columns}

    return measure_in_turns(
        [name for name, variant in VARIANTS.items() if variant["worker"] in workers],
        [f"{rows} rows" for rows in options.rows],
        repeats=options.repeats,
        units=UNITS,
        measure=measure,
    )


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    peers = parse_peers(options.peer_python, known=["vllm"])
    if "vllm" not in peers:
        print("vllm is skipped: no --peer-python vllm=PATH")
    logs = Path(tempfile.mkdtemp(prefix="bench-scheduler-"))
    with ExitStack() as stack:
        started = [
            stack.enter_context(PeerWorker(command)) for command in commands(peers, options.model, logs)
        ]
        series = measure_all({worker.name: worker for worker in started}, options)
    print(comparison_table(series, metric="plan + commit", ours="albireo"))
    recording.write(
        "scheduler-peer",
        series,
        note="A sample is the median over the steps of one repeat. No device, statistics off.",
        settings={"model": None, "peer_python": None, "variants": VARIANTS},
        peer_versions={worker.name: worker.hello["versions"] for worker in started},
    )


if __name__ == "__main__":
    main()
