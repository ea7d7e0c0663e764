"""The record of the host's work holds every step."""

from albireo_jax.measure.host_work import bench_host
from benchmarks.host_steps import series_of


def test_series_hold_every_step() -> None:
    series = series_of(bench_host([2, 4], pack=lambda plan: plan.num_tokens, steps=10, warmup_steps=2))
    assert {len(one.samples) for one in series} == {10}
    by_key = {(one.case, one.metric): one.samples for one in series}
    for case in ("2 rows", "4 rows"):
        parts = [by_key[case, metric] for metric in ("plan", "pack", "commit")]
        assert by_key[case, "plan + pack + commit"] == tuple(map(sum, zip(*parts, strict=True)))
