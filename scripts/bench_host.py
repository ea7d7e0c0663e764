"""The host's own work per decode step (plan, pack, commit), recorded; the device computes nothing.

The aim: medians of 0.15, 0.3 and 1.0 ms a step at 32, 128 and 512 rows. `albireo bench host` prints the same.

    python scripts/bench_host.py
"""

import argparse
import os
from pathlib import Path

from albireo_jax.core.config import CacheConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.experiments.bench import host_series
from albireo_jax.experiments.host_bench import HostBench, bench_host
from albireo_jax.experiments.records import Record, cpu_device, write_record
from albireo_jax.runtime.batch import bucket_grid, choose_bucket, layout, pack, pack_rows

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def packed_steps(rows: list[int], steps: int) -> HostBench:
    """Steps packed as the executor packs them."""
    page_size, max_rows = CacheConfig().page_size, max(rows)
    buckets = bucket_grid(max_rows, 2 * max_rows)

    def pack_plan(plan: StepPlan) -> object:
        bucket = choose_bucket(plan, buckets)
        forward = pack(plan, layout(bucket, page_size), padding_slot=max_rows)
        return forward, pack_rows(plan, bucket.rows, padding_slot=max_rows)

    return bench_host(rows, pack=pack_plan, steps=steps)


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    result = packed_steps(options.rows, options.steps)
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
