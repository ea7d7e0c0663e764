"""Real sweeps of a tiny model: workers that die, sweeps that are killed, and what is measured again."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.measure.loads import FixedBatch, cluster_arrivals
from albireo_jax.measure.worker_process import WorkerEndedError
from albireo_jax.sweep.cases import SweepPlan
from albireo_jax.sweep.replica_processes import ReplicaProcess
from albireo_jax.sweep.replica_worker import ReplicaJob
from albireo_jax.sweep.sweep_run import check_sweep, run_sweep
from albireo_jax.sweep.sweep_settings import SweepSettings, Variant

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SIZES = ("--batch-per-gpu", 2, "--input-len", 8, "--output-len", 6, "--max-step-tokens", 16, "--repeats", 2)


@pytest.fixture
def model(data_dir: Path) -> Path:
    return data_dir / "models" / "stories260k"


def tiny_plan(model: Path, **changes: object) -> SweepPlan:
    settings = SweepSettings(
        model=str(model),
        gpus=2,
        degrees=(1, 2),
        load=FixedBatch(per_gpu=2, input_len=8, output_len=6),
        one_replica=True,
        interleaved=True,
        virtual_devices=2,
        rows_per_gpu=2,
        max_step_tokens=16,
        repeats=2,
    )
    return check_sweep(replace(settings, **changes))


def kill_workers(when: str, lines: list[str]) -> Callable[[str], None]:
    """Keeps the lines that it is told; at the first that holds `when`, kills the workers of this process."""

    def tell(line: str) -> None:
        if when in line and not any(when in told for told in lines):
            for child in psutil.Process().children():
                if "albireo_jax.sweep.replica_worker" in child.cmdline():
                    child.kill()
        lines.append(line)

    return tell


def test_a_dying_worker_is_reported_and_only_its_case_is_measured_again(model: Path, tmp_path: Path) -> None:
    plan = tiny_plan(
        model, degrees=(1,), variants=(Variant.SYNCHRONOUS, Variant.OVERLAPPED), interleaved=False
    )
    lines: list[str] = []
    broken = run_sweep(plan, tmp_path, tell=kill_workers("tp1-synchronous repeat 1/2", lines))
    assert [failure.case.name for failure in broken.failures] == ["tp1-synchronous"]
    assert "the worker of replica 0 ended with code -9" in broken.failures[0].error
    assert [result.case.name for result in broken.results] == ["tp1-overlapped"]
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["tp1-overlapped.json"]

    again: list[str] = []
    whole = run_sweep(plan, tmp_path, tell=again.append)
    assert whole.failures == ()
    assert [result.case.name for result in whole.results] == ["tp1-synchronous", "tp1-overlapped"]
    assert whole.results[1] == broken.results[0]
    assert not any("tp1-overlapped repeat" in line for line in again)
    assert any("tp1-overlapped" in line and "already measured" in line for line in again)
    for result in whole.results:
        assert [run.repeat for run in result.runs] == [0, 1]
        for run in result.runs:
            assert (run.variant,) == result.case.variants
            assert run.num_requests == 2
            assert run.output_tokens_per_s == 2 * run.replica_tokens_per_s[0]
            assert 0 < run.ttft_p50_s <= run.ttft_p99_s
            assert run.kv.num_pages == result.case.num_pages


@pytest.mark.slow
def test_variants_take_turns_at_each_degree(model: Path, tmp_path: Path) -> None:
    sweep = run_sweep(tiny_plan(model), tmp_path, tell=lambda _: None)
    assert [result.case.tp for result in sweep.results] == [1, 2]
    for result in sweep.results:
        assert [run.repeat for run in result.runs] == [0, 0, 0, 1, 1, 1]
        turns = [run.variant for run in result.runs]
        assert turns == [*Variant, Variant.OVERLAPPED, Variant.SHARDED, Variant.SYNCHRONOUS]
        for run in result.runs:
            assert run.num_requests == 2 * result.case.tp
            assert run.output_tokens_per_s == run.replica_tokens_per_s[0] * 2 / result.case.tp


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_workers_and_goes_on(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "tp_sweep.py", model, "--gpus", 2, "--virtual-devices", 2]
    command += ["--tp", "1,2", *SIZES, "--out", tmp_path]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None  # it ends with the process, so that this loop does too
    for line in process.stderr:
        if "tp2 repeat 1/2" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert children
    assert not alive
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["tp1.json"]
    kept = (tmp_path / "cases" / "tp1.json").read_text()

    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert "tp1 (one of 2 replicas measured, times 2; 1 virtual" in done.stderr
    assert "already measured" in done.stderr
    assert (tmp_path / "cases" / "tp1.json").read_text() == kept
    degrees = {one["tp"] for one in json.loads((tmp_path / "sweep.json").read_text())["summary"]["figures"]}
    assert degrees == {1, 2}
    assert "<svg" in (tmp_path / "sweep.html").read_text()


@pytest.mark.slow
def test_replicas_run_side_by_side(model: Path, tmp_path: Path) -> None:
    plan = tiny_plan(model, degrees=(1,), one_replica=False, variants=(Variant.SHARDED,))
    sweep = run_sweep(plan, tmp_path, tell=lambda _: None)
    (result,) = sweep.results
    for run in result.runs:
        assert len(run.replica_tokens_per_s) == 2
        assert run.output_tokens_per_s == pytest.approx(sum(run.replica_tokens_per_s))
        assert run.num_requests == 4
    assert result.case.how.startswith("all 2 replicas measured side by side, summed; 2 virtual devices")


def job(model: Path) -> ReplicaJob:
    plan = tiny_plan(model)
    return ReplicaJob(
        model=str(model),
        dtype=Dtype.FLOAT32,
        case=plan.cases[0],
        replica=0,
        gpus=(),
        arrivals=tuple(cluster_arrivals(plan.settings.load, gpus=2, seed=0)),
        temperature=0.0,
        top_p=1.0,
    )


def test_a_worker_that_cannot_prepare_says_why(model: Path, tmp_path: Path) -> None:
    broken = replace(job(model), model=str(tmp_path / "gone"))
    worker = ReplicaProcess(broken)
    with pytest.raises(WorkerEndedError, match=r"replica 0 ended with code 1: (?s:.*)no model .*gone"):
        worker.ready()
    worker.close()
