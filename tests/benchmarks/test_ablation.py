"""The study's table, series and plots say of runs what their task tables say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from albireo_jax.engine.energy import EnergyReading
from albireo_jax.report.amdahl import amdahl
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.studies.ablation import (
    MID_LLAMA,
    TINY_LLAMA,
    AblationRun,
    chosen,
    gain_figure,
    gains,
    series_of,
    text_table,
    time_figure,
    typical,
    variants_at,
)
from tests.labs.clocked_lab import SUBJECT, requests_at, run_on_clock

STEPS_S = {1: (0.040, 0.041, 0.045), 2: (0.022, 0.021, 0.020)}


def clocked(tp: int, variant: Variant, step_s: float, *, rows: int) -> AblationRun:
    """A run of requests that come at once, on the clock."""
    run = run_on_clock(requests_at(*[0.0] * rows, output_len=20), depth=variant.depth, step_s=step_s)
    report = run.metered.reported(
        run.requests,
        run.outcome,
        subject=SUBJECT,
        load="some requests",
        energy=EnergyReading(joules=None, reason="a clock"),
    ).report
    measured = ReplicaRun(
        seconds=report.wall_s,
        num_tokens=report.output_tokens,
        ttft_s=report.ttft_s,
        tpot_s=report.tpot_s,
        table=report.table,
        kv=report.kv,
        energy_j=None,
    )
    return AblationRun(tp=tp, rows=rows, variant=variant, measured=measured)


@pytest.fixture(scope="module")
def runs() -> list[AblationRun]:
    """Three repeats of each variant at two degrees, with four requests and, at one degree, with two."""
    return [
        clocked(tp, variant, step_s, rows=rows)
        for tp, steps_s in STEPS_S.items()
        for rows in ((4,) if tp == 1 else (2, 4))
        for step_s in steps_s
        for variant in variants_at(tp)
    ]


def test_one_device_has_nothing_to_shard() -> None:
    assert variants_at(1) == [Variant.SYNCHRONOUS, Variant.OVERLAPPED]
    assert variants_at(8) == list(Variant)
    for tp in (1, 2, 4, 8):
        MID_LLAMA.check_tp(tp)
        TINY_LLAMA.check_tp(tp)


def test_the_typical_run_has_the_median_step(runs: list[AblationRun]) -> None:
    for tp, step_s in ((1, 0.041), (2, 0.021)):
        found = typical(chosen(runs, tp, 4, Variant.OVERLAPPED))
        assert found.step_ms == pytest.approx(1e3 * step_s)


def test_series_keep_every_repeat(runs: list[AblationRun]) -> None:
    series = {(one.subject, one.case, one.metric): one for one in series_of(runs)}
    for variant in Variant:
        for tp, rows in ((1, 4), (2, 2), (2, 4)):
            tables = [run.measured.table for run in chosen(runs, tp, rows, variant)]
            shares = tuple(amdahl(table).scalable_share for table in tables)
            found = series.get((variant.value, f"t = {tp}, {rows} at once", "scalable share"))
            assert (found.samples if found else ()) == shares
    spent = series["synchronous", "t = 1, 4 at once", "T1 schedule spent"]
    exposed = series["synchronous", "t = 1, 4 at once", "T1 schedule, exposed"]
    assert spent.samples == pytest.approx(exposed.samples)
    assert spent.unit == "us per step"


def test_gains_are_over_the_synchronous_engine_of_the_same_repeat(runs: list[AblationRun]) -> None:
    assert gains(runs, 2, 4, Variant.SYNCHRONOUS) == [1.0, 1.0, 1.0]
    rates = [
        [run.tokens_per_s for run in chosen(runs, 2, 4, variant)]
        for variant in (Variant.OVERLAPPED, Variant.SYNCHRONOUS)
    ]
    assert gains(runs, 2, 4, Variant.OVERLAPPED) == [a / b for a, b in zip(*rates, strict=True)]
    assert min(gains(runs, 2, 4, Variant.OVERLAPPED)) > 1


def test_table_and_plots_have_every_case(runs: list[AblationRun]) -> None:
    lines = text_table(runs).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["1", "4"]] * 2 + [["2", "2"]] * 3 + [["2", "4"]] * 3
    assert lines[1].endswith("1.00")
    device = SUBJECT.device
    drawn = time_figure(runs, device)
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == [
        f"t={tp}\n{variant.short}" for tp in (1, 2) for variant in variants_at(tp)
    ]
    assert "share 2 cores" in str(drawn.get_suptitle())
    assert "share" not in str(time_figure(runs, replace(device, virtual_devices=0)).get_suptitle())
    (axes,) = gain_figure(runs, device).axes
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 3


@pytest.mark.slow
def test_the_script_measures_each_degree_in_a_process(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "benchmarks.studies.ablation", "--small", "--degrees", "1", "2")
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True)
    (path,) = tmp_path.glob("ablation-*.json")
    record = json.loads(path.read_text())
    cases = {(one["subject"], one["case"]) for one in record["series"]}
    expected = {(v.value, f"t = {tp}, {n} at once") for tp in (1, 2) for v in variants_at(tp) for n in (1, 4)}
    assert cases == expected
    assert record["device"]["virtual_devices"] == 2
    assert "t of them share" in record["note"]
    plots = {plot.stem.rsplit("-", 1)[1]: plot.read_text() for plot in tmp_path.glob("*.svg")}
    assert set(plots) == {"time", "gain"}
    assert all(text.startswith("<?xml") for text in plots.values())
    samples = {(one["subject"], one["case"], one["metric"]): one["samples"] for one in record["series"]}
    for variant, case in expected:
        rates, synchronous = (samples[name, case, "output"] for name in (variant, "synchronous"))
        found = samples[variant, case, "gain over synchronous"]
        assert found == pytest.approx([a / b for a, b in zip(rates, synchronous, strict=True)], rel=1e-4)
