"""A report's shares add up to the time that passed, its prediction is Amdahl's, and it survives a file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from albireo_jax.core.config import CacheConfig, EngineConfig, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.engine.energy import EnergyReading
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.launch import prepare_random
from albireo_jax.report.amdahl import (
    Report,
    amdahl,
    content,
    from_json,
    parts,
    read_report,
    to_json,
)
from albireo_jax.report.measured_run import run_report
from albireo_jax.report.report_load import ReportLoad
from albireo_jax.report.report_page import number, page, terminal_text, time_bars, write_report
from tests.labs.clocked_lab import (
    COMMIT_S,
    DELIVER_S,
    PLAN_S,
    PREPARE_S,
    SAMPLE_S,
    SUBJECT,
    ClockedRun,
    requests_at,
    run_on_clock,
)

HOST_S = PLAN_S + PREPARE_S + COMMIT_S + DELIVER_S
NO_ENERGY = EnergyReading(joules=None, reason="no counter <here>")
TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_position=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def _report(run: ClockedRun, energy: EnergyReading = NO_ENERGY) -> Report:
    return run.metered.reported(
        run.requests, run.outcome, subject=SUBJECT, load="some requests & more", energy=energy
    ).report


def _with_work_s(table: TaskTable) -> float:
    return table.wall_s - table.no_work_s


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("step_s", [0.004, 0.02])
@pytest.mark.parametrize("arrivals", [(0.0,) * 6, (0.0, 0.3, 0.9, 0.95, 2.0, 2.0)])
def test_shares_add_up_to_the_time_that_passed_on_the_clock(
    depth: int, step_s: float, arrivals: tuple[float, ...]
) -> None:
    run = run_on_clock(requests_at(*arrivals), depth=depth, step_s=step_s)
    table = _report(run).table
    device_s = sum(task.total_s for task in table.tasks if task.on_device) + table.copies.exposed_s
    passed_s = table.exposed_s + device_s + table.no_work_s
    assert passed_s == pytest.approx(run.window_s, rel=0.02)
    assert device_s == pytest.approx(step_s * (len(run.watch.plans) - 1), rel=0.02)
    assert sum(part.seconds for part in parts(table)) == pytest.approx(_with_work_s(table), rel=0.02)


def test_the_synchronous_engine_exposes_its_host_and_the_law_predicts_what_hiding_it_brings() -> None:
    requests = requests_at(*[0.0] * 4, output_len=40)
    synchronous = _report(run_on_clock(requests, depth=1, step_s=0.02))
    overlapped = _report(run_on_clock(requests, depth=2, step_s=0.02))
    law = amdahl(synchronous.table)
    assert law.scalable_share == pytest.approx((0.02 - SAMPLE_S) / (0.02 + HOST_S), rel=0.02)
    gained = _with_work_s(synchronous.table) / _with_work_s(overlapped.table)
    assert law.hidden == pytest.approx(gained, rel=0.02)
    assert amdahl(overlapped.table).hidden == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("times", [2, 4])
def test_predictions_come_true_where_only_the_forward_pass_shrinks(times: int) -> None:
    requests = requests_at(*[0.0] * 4, output_len=40)
    forward_s = 0.04
    now, faster = (
        _report(run_on_clock(requests, depth=1, step_s=SAMPLE_S + forward_s / k)).table for k in (1, times)
    )
    assert amdahl(now).at(times) == pytest.approx(_with_work_s(now) / _with_work_s(faster), rel=0.02)
    assert amdahl(now).hidden_at(times) == pytest.approx(
        amdahl(now).hidden * amdahl(now).at(1) * (forward_s + SAMPLE_S) / (forward_s / times + SAMPLE_S)
    )


def test_a_table_without_time_of_the_devices_predicts_nothing() -> None:
    """A fast device can have ended each step before the host has queued it."""
    report = _report(run_on_clock(requests_at(*[0.0] * 4, output_len=40), depth=1, step_s=0.02))
    tasks = tuple(replace(task, total_s=0.0) if task.on_device else task for task in report.table.tasks)
    law = amdahl(replace(report.table, tasks=tasks))
    assert law.scalable_share == 0
    assert [law.hidden, law.at(2), law.hidden_at(2)] == [1, 1, 1]
    assert content(replace(report, table=replace(report.table, tasks=tasks)))
    assert page(replace(report, table=replace(report.table, tasks=tasks)))


def test_a_real_engine_adds_up_too() -> None:
    config = EngineConfig(
        model="random",
        max_logprobs=0,
        cache=CacheConfig(num_pages=64, page_size=16),
        scheduler=SchedulerConfig(max_rows=2, max_step_tokens=8),
    )
    load = ReportLoad(requests=6, input_len=20, output_len=120)
    engine = prepare_random(config, TINY, measure_sampling=True)
    run = run_report(engine, load, load.arrivals(), model="tiny")
    report = run.report
    table = report.table
    device_s = sum(task.total_s for task in table.tasks if task.on_device) + table.copies.exposed_s
    assert table.exposed_s + device_s + table.no_work_s == pytest.approx(table.wall_s, rel=0.02)
    # The first step ends before the first token is handed out, the last before the last is.
    assert table.wall_s == pytest.approx(
        report.wall_s - min(request.first_s for request in report.requests), rel=0.02, abs=0.05
    )
    assert report.output_tokens == 6 * 120
    assert report.work.computed == 6 * (20 + 120 - 1)
    assert report.work.wasted == 0
    assert 0 < report.kv.mean_pages <= report.kv.peak_pages <= 2 * 9
    assert report.energy.joules is None
    assert "cpu" in report.energy.reason
    assert from_json(to_json(report)) == report
    assert max(span.step for span in run.spans if span.step is not None) == table.steps


def test_a_report_survives_a_file_and_its_derived_figures_follow_from_it(tmp_path: Path) -> None:
    report = _report(run_on_clock(requests_at(*[0.0] * 6), depth=2, step_s=0.004))
    paths = write_report(report, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.json", "report.html"]
    assert read_report(paths[0]) == report
    assert content(read_report(paths[0])) == content(report)
    derived = json.loads(paths[0].read_text())["derived"]
    law = amdahl(report.table)
    assert derived["scalable_share"] == law.scalable_share
    assert derived["predicted_speedup"]["at 2t"] == law.at(2)
    assert derived["joules_per_token"] is None
    assert write_report(report, tmp_path / "new" / "folder")[1].read_text() == page(report)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"subject": 3}', "not json"])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a report"):
        read_report(path)
    with pytest.raises(ValueError, match=r"missing\.json is not a report"):
        read_report(tmp_path / "missing.json")


def test_energy_is_per_token_and_per_request_where_it_is_known() -> None:
    run = run_on_clock(requests_at(*[0.0] * 6), depth=2, step_s=0.004)
    report = _report(run, EnergyReading(joules=330.0))
    assert report.joules_per_token == 330 / sum(request.max_tokens for request in run.requests)
    assert report.joules_per_request == 55
    assert "energy per request, J" in terminal_text(report)
    unknown = _report(run)
    assert unknown.joules_per_token is None
    assert unknown.joules_per_request is None
    assert "not known: no counter <here>" in terminal_text(unknown)


def test_the_page_has_the_reports_figures_and_escapes_its_names() -> None:
    report = _report(run_on_clock(requests_at(*[0.0] * 6), depth=2, step_s=0.004))
    hostile = replace(report, subject=replace(SUBJECT, model="</script><b>x</b>"))
    text = page(hostile)
    assert "<b>x</b>" not in text
    assert "no counter &lt;here&gt;" in text
    assert f"{amdahl(report.table).scalable_share:.1%}" in text
    start = text.index('<script type="application/json" id="data">') + 42
    assert json.loads(text[start : text.index("</script>", start)]) == json.loads(to_json(hostile))
    assert text.count("<svg") == 3


def test_bars_of_several_tables_have_the_same_parts_and_the_height_of_a_step() -> None:
    requests = requests_at(*[0.0] * 6)
    tables = [_report(run_on_clock(requests, depth=depth, step_s=0.02)).table for depth in (1, 2)]
    bars = time_bars(tables)
    for index, table in enumerate(tables):
        height = sum(bar.values[index] or 0 for bar in bars)
        assert height == pytest.approx(1e3 * _with_work_s(table) / table.steps)
    assert "copies of KV pages, exposed" not in [bar.name for bar in bars]


def test_a_run_without_steps_is_refused() -> None:
    run = run_on_clock(requests_at(0.0, output_len=1), depth=2, step_s=0.02)
    with pytest.raises(ValueError, match="fewer than 2 steps"):
        _report(run)


def test_waste_is_what_was_computed_again_and_behind_an_end() -> None:
    limits = EngineLimits(max_model_len=64, vocab_size=50, num_pages=12, page_size=4)
    tight = run_on_clock(requests_at(*[0.0] * 6, output_len=20), depth=2, step_s=0.02, limits=limits)
    work = _report(tight).work
    assert tight.metered.loop.scheduler.stats().preemptions > 0
    needed = sum(len(request.prompt_token_ids) + request.max_tokens - 1 for request in tight.requests)
    found = tight.metered.loop.scheduler.stats().cache.cached_tokens
    assert work.computed == sum(plan.num_tokens for plan in tight.watch.plans)
    assert work.recomputed > 0
    assert found == 0
    assert work.computed == needed + work.recomputed + work.dropped

    # Ids on the clock are all 0: each request ends by a stop token with a step for one more in flight.
    stopped = [replace(request, stop_ids=(0,)) for request in requests_at(*[0.0] * 4)]
    for depth, dropped in ((1, 0), (2, 4)):
        work = _report(run_on_clock(stopped, depth=depth, step_s=0.02)).work
        assert (work.dropped, work.recomputed) == (dropped, 0)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (ReportLoad(requests=0, input_len=1, output_len=1), "at least 1, got 0"),
        (ReportLoad(requests=1, input_len=1, output_len=1, trace=Path("missing.csv")), r"missing\.csv"),
        (ReportLoad(requests=1, input_len=1, output_len=1, trace=Path("x"), scale=-1.0), "above 0, got -1"),
    ],
)
def test_a_load_that_does_nothing_is_refused(load: ReportLoad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load.arrivals()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123, "0.01"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")],
)
def test_figures_have_few_digits(value: float, text: str) -> None:
    assert number(value) == text
