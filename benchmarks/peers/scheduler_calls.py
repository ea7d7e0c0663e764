"""Scheduling beside vLLM's: plan + commit here, schedule + update_from_output there, in one run.

Both schedulers hold the same number of requests in steady decode and run without a device, each in a
process of its own and in turns. Ours runs twice: in this environment, and in vLLM's (only NumPy is
needed), so that both are also compared on one Python. vLLM's variants are those of its defaults: with
its steps in flight (`async`, the default on accelerators) and one after the other (`sync`, its choice on
CPUs), without prefix caching, which ours does not have either, and `async` with it.

    python benchmarks/peers/scheduler_calls.py --peer-python vllm=VENV/bin/python --model FOLDER
"""

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from benchmarks.lib.compare import (
    Worker,
    WorkerCommand,
    comparison_table,
    measure_in_turns,
    parse_peers,
)

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks" / "peers" / "workers"
UNITS = {"plan": "µs", "commit": "µs", "plan + commit": "µs"}
VARIANTS = {
    "vllm sync": {"worker": "vllm", "depth": 1, "block_size": 16, "prefix_caching": False},
    "vllm async": {"worker": "vllm", "depth": 2, "block_size": 16, "prefix_caching": False},
    "vllm async, prefix caching": {"worker": "vllm", "depth": 2, "block_size": 16, "prefix_caching": True},
    "albireo": {"worker": "albireo", "depth": 2},
    "albireo in vllm's Python": {"worker": "albireo in vllm's Python", "depth": 2},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", action="append", default=[], metavar="vllm=PATH")
    parser.add_argument("--model", required=True, help="model folder, for vLLM's configuration only")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300, help="decode steps timed per repeat")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def commands(peers: dict[str, str], model: str, logs: Path) -> list[WorkerCommand]:
    """Our worker, and in vLLM's environment, if there is one, vLLM's and ours again."""
    ours = str(PEERS / "albireo_scheduler_worker.py")
    found = [WorkerCommand(name="albireo", command=[sys.executable, ours], log=logs / "albireo.log")]
    if "vllm" in peers:
        theirs = [peers["vllm"], str(PEERS / "vllm_scheduler_worker.py"), "--model", model]
        found += [
            WorkerCommand(
                name="vllm", command=theirs, log=logs / "vllm.log", environment={"HF_HUB_OFFLINE": "1"}
            ),
            WorkerCommand(
                name="albireo in vllm's Python",
                command=[peers["vllm"], ours],
                log=logs / "albireo-in-vllm.log",
                environment={"PYTHONPATH": str(ROOT)},
            ),
        ]
    return found


def measure_all(workers: dict[str, Worker], options: argparse.Namespace) -> list[Series]:
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
    options = arguments()
    load_before = os.getloadavg()[0]
    peers = parse_peers(options.peer_python, known=["vllm"])
    if "vllm" not in peers:
        print("vllm is skipped: no --peer-python vllm=PATH")
    logs = Path(tempfile.mkdtemp(prefix="bench-scheduler-"))
    with ExitStack() as stack:
        started = [stack.enter_context(Worker(command)) for command in commands(peers, options.model, logs)]
        workers = {worker.name: worker for worker in started}
        series = measure_all(workers, options)
    print(comparison_table(series, metric="plan + commit", ours="albireo"))
    record = Record(
        name="scheduler-peer",
        device=cpu_device(),
        settings={
            "steps": options.steps,
            "warmup": options.warmup,
            "prompt_len": options.prompt_len,
            "variants": VARIANTS,
        },
        series=series,
        note="A sample is the median over the steps of one repeat. No device, statistics off.",
        load_before=load_before,
        peer_versions={worker.name: worker.hello["versions"] for worker in started},
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
