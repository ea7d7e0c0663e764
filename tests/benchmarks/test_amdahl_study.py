"""The study's table, series and plot say of runs what their reports say."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.engine.energy import EnergyReading
from albireo_jax.report.amdahl import amdahl
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.lib.study_shapes import MID_LLAMA, TINY_LLAMA
from tests.labs.clocked_lab import SUBJECT, requests_at, run_on_clock

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "amdahl_study.py"
STEPS_S = {1: (0.040, 0.041, 0.045), 2: (0.022, 0.021, 0.020)}


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def runs(study: dict[str, Any]) -> list[Any]:
    """Three repeats of each variant at two degrees, on the clock."""
    made = []
    cases = [(tp, step_s) for tp, steps_s in STEPS_S.items() for step_s in steps_s]
    for tp, step_s in cases:
        for variant in study["variants_at"](tp):
            run = run_on_clock(requests_at(*[0.0] * 4, output_len=20), depth=variant.depth, step_s=step_s)
            subject = replace(SUBJECT, tp=tp, depth=variant.depth, sampling=variant.sampling.value)
            reported = run.metered.reported(
                run.requests,
                run.outcome,
                subject=subject,
                load="four requests",
                energy=EnergyReading(joules=None, reason="a clock"),
            )
            made.append(study["Run"](variant=variant, report=reported.report))
    return made


def test_one_device_has_nothing_to_shard(study: dict[str, Any]) -> None:
    assert study["variants_at"](1) == [Variant.SYNCHRONOUS, Variant.OVERLAPPED]
    assert study["variants_at"](8) == list(Variant)
    for tp in (1, 2, 4, 8):
        MID_LLAMA.check_tp(tp)
        TINY_LLAMA.check_tp(tp)


def test_the_typical_run_has_the_median_step(study: dict[str, Any], runs: list[Any]) -> None:
    for tp, step_s in ((1, 0.041), (2, 0.021)):
        typical = study["typical"](runs, tp, Variant.OVERLAPPED)
        assert study["step_ms"](typical) == pytest.approx(1e3 * step_s)


def test_series_keep_every_repeat(study: dict[str, Any], runs: list[Any]) -> None:
    series = {(one.subject, one.case, one.metric): one for one in study["series_of"](runs)}
    for variant in Variant:
        for tp in (1, 2):
            reports = [run.report for run in runs if (run.variant, run.report.subject.tp) == (variant, tp)]
            shares = tuple(amdahl(report.table).scalable_share for report in reports)
            found = series.get((variant.value, f"t = {tp}", "scalable share"))
            assert (found.samples if found else ()) == shares
    spent = series["synchronous", "t = 1", "T1 schedule spent"]
    exposed = series["synchronous", "t = 1", "T1 schedule, exposed"]
    assert spent.samples == pytest.approx(exposed.samples)
    assert spent.unit == "us per step"


def test_table_and_plot_have_every_case(study: dict[str, Any], runs: list[Any]) -> None:
    lines = study["text_table"](runs, [1, 2]).splitlines()
    assert [line[:2].strip() for line in lines[1:]] == ["1", "1", "2", "2", "2"]
    assert lines[1].endswith("1.00")
    device = SUBJECT.device
    assert "t virtual devices share 2 cores" in study["plot"](runs, [1, 2], device)
    assert "share" not in study["plot"](runs, [1, 2], replace(device, virtual_devices=0))
    assert study["plot"](runs, [1, 2], device).count("t=2") == 3
