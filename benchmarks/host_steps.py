"""The host's own work per decode step (plan, pack, commit), recorded; the device computes nothing.

The aim: medians of 0.15, 0.3 and 1.0 ms a step at 32, 128 and 512 rows. `albireo bench host` prints the same.

    python benchmarks/host_steps.py
"""

import argparse
import os
from pathlib import Path

from albireo_jax.measure.host_work import bench_host, plan_packer
from albireo_jax.measure.records import Record, cpu_device, write_record
from albireo_jax.measure.throughput import host_series

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    result = bench_host(options.rows, pack=plan_packer(max(options.rows)), steps=options.steps)
    print(result.render())
    record = Record(
        name="host",
        device=cpu_device(),
        settings={"rows": options.rows, "steps": options.steps, "depth": 2},
        series=host_series(result),
        note="Null executor, two steps in flight, prompts of 128 to 143 tokens; one sample per decode step.",
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
