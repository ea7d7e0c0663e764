"""From runs of replicas to the figures of a cluster, its table, page and record."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.core.config import Dtype, SchedulerConfig
from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import TaskTable, TaskTime, Timeline
from albireo_jax.measure.kv_contention import ContentionMeter, KvUse
from albireo_jax.measure.loads import FixedBatch, cluster_arrivals
from albireo_jax.measure.records import Device
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import replay
from albireo_jax.sweep.cases import SweepCase, SweepPlan, plan_sweep
from albireo_jax.sweep.devices import gpu_device, parse_gpus
from albireo_jax.sweep.results import (
    CaseResult,
    Failure,
    ReplicaRun,
    Summary,
    Sweep,
    cluster_run,
)
from albireo_jax.sweep.sweep_page import sections, sweep_page, write_report
from albireo_jax.sweep.sweep_run import read_case, settings_hash, write_whole
from albireo_jax.sweep.sweep_settings import SweepSettings, Variant
from albireo_jax.sweep.sweep_tables import print_summary, record_sweep, rule_text

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    vocab_size=512,
    max_position=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
DEVICE = Device(kind="cpu", name="Some CPU", count=2, memory_bytes=2**30, virtual_devices=8)
SPEEDS = {Variant.SYNCHRONOUS: (10, 21, 30, 15), Variant.OVERLAPPED: (10, 25, 60, 66)}


def replica_run(tokens_per_s: float, *, energy_j: float | None = None) -> ReplicaRun:
    """A run of 100 tokens at this rate."""
    seconds = 100 / tokens_per_s
    names = ("T1 schedule", "T2 prepare inputs", "T3 forward", "T4 sample", "T5 process outputs")
    tasks = tuple(
        TaskTime(name=name, total_s=0.1 * seconds, exposed_s=0.05 * seconds, on_device=name[1] in "34")
        for name in names
    )
    return ReplicaRun(
        seconds=seconds,
        num_tokens=100,
        ttft_s=(0.1, 0.2, 0.3, 0.4),
        tpot_s=(0.01, 0.02),
        table=TaskTable(
            steps=50,
            wall_s=seconds,
            device_busy_s=0.8 * seconds,
            no_work_s=0.0,
            between_s=0.05 * seconds,
            tasks=tasks,
            copies=TaskTime(name="page copies", total_s=0.0, exposed_s=0.0, on_device=True),
        ),
        kv=KvUse(
            num_pages=40,
            peak_pages=30,
            mean_pages=20.0,
            preemptions=2,
            waited_for_tokens_s=0.0,
            waited_for_rows_s=1.0,
            waited_for_pages_s=2.0,
        ),
        energy_j=energy_j,
        energy_reason="" if energy_j else "no counter",
    )


def made_plan() -> SweepPlan:
    settings = SweepSettings(
        model="smollm2",
        gpus=8,
        degrees=(1, 2, 4, 8),
        load=FixedBatch(per_gpu=1, input_len=8, output_len=8),
        one_replica=True,
        interleaved=True,
        variants=tuple(SPEEDS),
        virtual_devices=8,
        gpu_memory_bytes=2**30,
        rows_per_gpu=1,
    )
    arrivals = tuple(cluster_arrivals(settings.load, gpus=8, seed=0))
    return plan_sweep(settings, MODEL, arrivals, device_memory_bytes=None)


def made_result(case: SweepCase, *, hash_: str = "abc") -> CaseResult:
    place = (1, 2, 4, 8).index(case.tp)
    runs = tuple(
        cluster_run(
            case,
            variant,
            repeat,
            replicas=[replica_run(SPEEDS[variant][place] * case.tp / 8 + noise)] * case.measured_replicas,
        )
        for repeat, noise in enumerate((0.0, 0.01, 0.5))
        for variant in SPEEDS
    )
    return CaseResult(
        case=case,
        settings_hash=hash_,
        date="2026-11-23T00:00:00+00:00",
        revision=None,
        num_pages=40,
        page_bytes=1,
        weight_bytes=1,
        dtype=Dtype.FLOAT32,
        runs=runs,
    )


def made_sweep() -> Sweep:
    plan = made_plan()
    results = tuple(made_result(case) for case in plan.cases)
    return Sweep(plan=plan, device=DEVICE, load_before=0.5, results=results, failures=())


def test_replicas_side_by_side_are_summed_and_one_alone_is_multiplied() -> None:
    case = replace(made_plan().cases[1], num_replicas=4)
    alone = cluster_run(
        replace(case, measured_replicas=1), Variant.OVERLAPPED, 0, replicas=[replica_run(25.0)]
    )
    assert alone.output_tokens_per_s == pytest.approx(100.0)
    four = [replica_run(rate, energy_j=50.0) for rate in (10.0, 20.0, 30.0, 40.0)]
    together = cluster_run(replace(case, measured_replicas=4), Variant.OVERLAPPED, 0, replicas=four)
    assert together.output_tokens_per_s == pytest.approx(100.0)
    assert together.replica_tokens_per_s == pytest.approx((10, 20, 30, 40))
    assert together.num_requests == 16
    assert (together.ttft_p50_s, together.ttft_p99_s) == (0.2, 0.4)
    assert together.energy_j_per_token == pytest.approx(0.5)
    assert alone.energy_j_per_token is None
    assert alone.energy_reason == "no counter"
    assert together.table.wall_s == pytest.approx(sum(run.table.wall_s for run in four))
    assert together.table.idle_share == pytest.approx(0.2)
    assert together.kv.preemptions == 8
    unknown = [*four[:3], replica_run(40.0)]
    mixed = cluster_run(replace(case, measured_replicas=4), Variant.OVERLAPPED, 0, replicas=unknown)
    assert mixed.energy_j_per_token is None


def test_t_e_is_the_degree_of_the_highest_throughput() -> None:
    summary = made_sweep().summary()
    assert summary.t_e == {"synchronous": 4, "overlapped": 8}
    for variant in SPEEDS:
        ones = [one for one in summary.figures if one.variant is variant]
        best = max(ones, key=lambda one: one.output_tokens_per_s.median)
        assert best.tp == summary.t_e[variant.value]
    assert "4M/C" in rule_text(summary)
    assert "latencies" not in rule_text(summary)
    assert "latencies" in rule_text(replace(summary, at_once=False))


def test_figures_of_a_cluster_and_of_a_gpu_agree() -> None:
    sweep = made_sweep()
    for one in sweep.figures():
        assert one.per_gpu_tokens_per_s * 8 == pytest.approx(one.output_tokens_per_s.median)
        assert one.output_tokens_per_s.low <= one.output_tokens_per_s.median <= one.output_tokens_per_s.high
        result = next(result for result in sweep.results if result.case.tp == one.tp)
        runs = [run.output_tokens_per_s for run in result.runs if run.variant is one.variant]
        assert one.output_tokens_per_s.median == sorted(runs)[1]
        assert one.kv_peak_share == 0.75
        assert one.waited_for_pages_s == pytest.approx(0.5)
    gains = {(one.tp, one.variant): one.gain for one in sweep.figures()}
    synchronous, overlapped = gains[8, Variant.SYNCHRONOUS], gains[8, Variant.OVERLAPPED]
    assert synchronous is not None
    assert overlapped is not None
    assert synchronous.low == synchronous.high == 1.0
    assert overlapped.high == pytest.approx(66 / 15)  # of the first repeat: the others have noise


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    plan = made_plan()
    wanted = settings_hash(plan, plan.cases[0], device=DEVICE)
    result = made_result(plan.cases[0], hash_=wanted)
    path = tmp_path / "tp1.json"
    write_whole(path, json.dumps(result.to_json()))
    assert read_case(path, settings_hash=wanted) == result
    assert read_case(path, settings_hash="other") is None
    assert read_case(tmp_path / "none.json", settings_hash=wanted) is None
    for damaged in (path.read_text()[:-9], "[]", "{}", path.read_text().replace('"repeat"', '"again"')):
        path.write_text(damaged)
        assert read_case(path, settings_hash=wanted) is None
    assert [file.name for file in tmp_path.iterdir()] == ["tp1.json"]


def test_whatever_changes_the_figures_changes_the_hash() -> None:
    plan = made_plan()
    case = plan.cases[0]
    longer = tuple(replace(arrival, output_tokens=9) for arrival in plan.arrivals)
    others = [
        settings_hash(plan, plan.cases[1], device=DEVICE),
        settings_hash(replace(plan, arrivals=longer), case, device=DEVICE),
        settings_hash(replace(plan, dtype=Dtype.BFLOAT16), case, device=DEVICE),
        settings_hash(plan, replace(case, num_pages=7), device=DEVICE),
        settings_hash(plan, case, device=replace(DEVICE, name="Another")),
        *(
            settings_hash(replace(plan, settings=replace(plan.settings, **change)), case, device=DEVICE)
            for change in ({"repeats": 9}, {"warmups": 9}, {"seed": 9}, {"temperature": 0.0}, {"top_p": 0.5})
        ),
    ]
    first = settings_hash(plan, case, device=DEVICE)
    assert first == settings_hash(made_plan(), case, device=DEVICE)
    assert len({first, *others}) == 1 + len(others)


def test_the_page_shows_nothing_but_its_data(tmp_path: Path) -> None:
    page = write_report(made_sweep(), tmp_path)
    text = page.read_text()
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert embedded is not None
    data = json.loads(embedded.group(1))
    assert data == json.loads((tmp_path / "sweep.json").read_text())
    again = dataclass_from_json(Summary, data["summary"])
    assert again == made_sweep().summary()
    assert sweep_page(again, data) == text  # so every number was made of the data alone
    assert [CaseResult.from_json(case) for case in data["cases"]] == list(made_sweep().results)


def test_every_figure_of_a_cluster_says_how_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = made_sweep()
    summary = sweep.summary()
    for section in sections(summary)[:2]:
        assert section.table is not None
        for row, tp in zip(section.table.rows, (1, 2, 4, 8), strict=True):
            count = 8 // tp
            how = (
                f"one of {count} replicas measured, times {count}"
                if count > 1
                else "the one replica measured"
            )
            assert row[-1].startswith(how)
            assert f"{tp} virtual" in row[-1]
    print_summary(summary)
    assert "one of 8 replicas" in capsys.readouterr().out
    record = json.loads(record_sweep(sweep, tmp_path).read_text())
    assert record["device"]["virtual_devices"] == 8
    assert all("replica" in series["case"] and "virtual" in series["case"] for series in record["series"])


def test_failures_are_shown_and_leave_the_rest(tmp_path: Path) -> None:
    sweep = made_sweep()
    failure = Failure(case=sweep.plan.cases[3], error="killed: <out of memory>")
    part = replace(sweep, results=sweep.results[:3], failures=(failure,))
    assert part.summary().t_e == {"synchronous": 4, "overlapped": 4}
    assert "killed: &lt;out of memory&gt;" in write_report(part, tmp_path).read_text()
    none = replace(sweep, results=(), failures=(failure,))
    assert none.summary().t_e == {}
    assert "killed" in write_report(none, tmp_path).read_text()


@given(
    seconds=st.floats(0.001, 1e6),
    counts=st.lists(st.integers(0, 10**9), max_size=4),
    energy=st.none() | st.floats(0, 1e9),
)
def test_runs_survive_json(seconds: float, counts: list[int], energy: float | None) -> None:
    run = replace(
        replica_run(1.0), seconds=seconds, ttft_s=tuple(map(float, counts)), energy_j=energy, tpot_s=()
    )
    assert dataclass_from_json(ReplicaRun, json.loads(json.dumps(asdict(run)))) == run


@pytest.mark.parametrize(
    "change", [{"seconds": "1"}, {"seconds": None}, {"ttft_s": 1.0}, {"kv": {}}, {"more": 1}]
)
def test_json_of_another_form_is_refused(change: dict[str, object]) -> None:
    content = json.loads(json.dumps(asdict(replica_run(1.0)))) | change
    with pytest.raises(ValueError, match="expected"):
        dataclass_from_json(ReplicaRun, content)


def contention(*, num_pages: int, max_rows: int, max_step_tokens: int = 64) -> KvUse:
    """Eight requests of 32 + 32 tokens at once on the simulator; a step takes a second."""
    limits = EngineLimits(max_model_len=64, vocab_size=50, num_pages=num_pages, page_size=16)
    clock = Clock()
    executor = SimExecutor(limits, max_rows=max_rows, cost=lambda _: 1.0, clock=clock)
    config = SchedulerConfig(max_rows=max_rows, max_step_tokens=max_step_tokens)
    scheduler = Scheduler(config, limits)
    meter = ContentionMeter(
        executor, scheduler, max_rows=max_rows, max_step_tokens=max_step_tokens, clock=clock
    )
    loop = EngineLoop(scheduler, meter, depth=2, timeline=Timeline(clock=clock))
    requests = [
        Request(request_id=str(index), prompt_token_ids=(index,) * 32, max_tokens=32) for index in range(8)
    ]
    replay(loop, requests, clock=clock)
    return meter.use()


def test_what_requests_waited_for_is_told_apart() -> None:
    free = contention(num_pages=80, max_rows=8, max_step_tokens=512)
    assert (free.waited_for_pages_s, free.waited_for_rows_s, free.waited_for_tokens_s) == (0, 0, 0)
    assert free.peak_pages == 8 * 4
    assert 0 < free.mean_pages < 32
    rows = contention(num_pages=80, max_rows=2, max_step_tokens=512)
    assert rows.waited_for_rows_s > 60
    assert rows.waited_for_pages_s == 0
    assert rows.peak_pages == 2 * 4
    tokens = contention(num_pages=80, max_rows=8, max_step_tokens=20)
    assert tokens.waited_for_tokens_s > 10
    assert tokens.waited_for_pages_s == 0
    pages = contention(num_pages=10, max_rows=8, max_step_tokens=512)
    assert pages.waited_for_pages_s > 60
    assert pages.waited_for_rows_s == 0
    assert pages.peak_pages <= pages.num_pages == 10
    assert pages.preemptions > 0


def test_gpus_are_read_from_what_their_driver_prints() -> None:
    gpus = parse_gpus("NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\n")
    assert [gpu.memory_bytes for gpu in gpus] == [81559 * 2**20] * 2
    assert gpu_device(gpus).label == "gpu-nvidia-h100-80gb-hbm3-2"
    assert parse_gpus("No devices were found\n") == []
