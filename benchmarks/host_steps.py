"""The host's own work per decode step (plan, pack, commit), recorded; the device computes nothing.

The aim: medians of 0.15, 0.3 and 1.0 ms a step at 32, 128 and 512 rows. `albireo bench host` prints the same.

    python -m benchmarks.host_steps
"""

from albireo_jax.measure.host_work import HostBench, bench_host, plan_packer
from albireo_jax.measure.records import Series, series_by_metric
from benchmarks.lib.recording import Recording, script_parser

NOTE = "Null executor, two steps in flight, prompts of 128 to 143 tokens; one sample per decode step."


def series_of(result: HostBench) -> list[Series]:
    """Plan, pack and commit of every measured step, in seconds."""
    return [
        series
        for sample in result.samples
        for series in series_by_metric(
            "albireo",
            f"{sample.rows} rows",
            {
                ("plan", "s"): sample.plan_s,
                ("pack", "s"): sample.pack_s,
                ("commit", "s"): sample.commit_s,
                ("plan + pack + commit", "s"): sample.step_s,
            },
        )
    ]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    recording = Recording.begin(parser)
    rows = recording.options.rows
    result = bench_host(rows, pack=plan_packer(max(rows)), steps=recording.options.steps)
    print(result.render())
    recording.write("host", series_of(result), note=NOTE, settings={"depth": 2})


if __name__ == "__main__":
    main()
