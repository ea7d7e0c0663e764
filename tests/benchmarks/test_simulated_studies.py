"""Studies on simulated GPUs: laws of what they compare, and that their scripts write what they say."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.sim.gpus import GPUS
from albireo_jax.sim.host import NO_HOST, OWN_HOST, VLLM_0_11_2
from albireo_jax.sim.planning.plan_sizes import Excluded, Question
from albireo_jax.sim.replica import Targets
from albireo_jax.sim.step_model import VLLM_SAMPLER, roofline_model
from albireo_jax.sim.workload import Arrival, poisson_arrivals
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.studies.simulated_contention import PressurePoint, pressure_points
from benchmarks.studies.simulated_te import (
    OnceLoad,
    StepTerms,
    TeSweep,
    decode_step,
    expected_tp,
    forward_factor,
    te_sweep,
    why,
)

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
H100 = GPUS["h100"]
BATCH = OnceLoad(input_tokens=32, output_tokens=16)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11_008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32_000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)


def sweep(terms: StepTerms, *, num_gpus: int = 4) -> TeSweep:
    return te_sweep("Llama-2-7b-hf", MODEL, H100, num_gpus=num_gpus, terms=terms, batch=BATCH)


@pytest.mark.parametrize(
    "terms",
    [
        StepTerms(name="paper", host=VLLM_0_11_2, sampler=VLLM_SAMPLER),
        StepTerms(name="own", host=OWN_HOST),
    ],
    ids=lambda terms: terms.name,
)
def test_each_mechanism_serves_more_where_there_is_something_to_gain(terms: StepTerms) -> None:
    done = sweep(terms)
    for points in zip(*(done.points[variant] for variant in Variant), strict=True):
        synchronous, overlapped, sharded = (point.tokens_per_s for point in points)
        assert synchronous < overlapped
        assert overlapped <= sharded * (1 + 1e-9)
        if points[0].tp > 1:
            assert overlapped < sharded


def test_a_host_that_takes_no_time_leaves_nothing_to_overlap() -> None:
    done = sweep(StepTerms(name="no host", host=NO_HOST))
    for before, after in zip(done.points[Variant.SYNCHRONOUS], done.points[Variant.OVERLAPPED], strict=True):
        assert after.tokens_per_s == pytest.approx(before.tokens_per_s)
        assert before.task_ms["exposed host"] == pytest.approx(0, abs=1e-9)


def test_more_host_time_per_row_lowers_the_synchronous_t_e() -> None:
    own, paper = (
        sweep(terms).best(Variant.SYNCHRONOUS).tp
        for terms in (
            StepTerms(name="own", host=OWN_HOST),
            StepTerms(name="paper", host=VLLM_0_11_2, sampler=VLLM_SAMPLER),
        )
    )
    assert paper < own


def test_the_reason_names_the_parts_of_a_step() -> None:
    done = sweep(StepTerms(name="own", host=OWN_HOST))
    best = done.best(Variant.SHARDED)
    assert why(done, Variant.SHARDED, best.tp) == ""
    reason = why(done, Variant.SHARDED, 1)
    assert reason.startswith("t=1 serves -")
    for part in ("T3 forward", "T4 sample", "exposed host"):
        assert part in reason
    assert why(done, Variant.SHARDED, 8) == "t=8 is not possible: 4 GPUs are no multiple of 8"


def test_a_slowed_forward_pass_takes_the_seconds_that_were_asked_for() -> None:
    factor = forward_factor(MODEL, H100, tp=2, rows=64, context=200, seconds=0.02)
    slowed = StepTerms(name="slow", host=NO_HOST, forward_factor=factor)
    steps = slowed.steps(MODEL, H100, tp=2, mode=SamplingMode.SHARDED)
    assert steps.forward(decode_step(64, context=200)) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "found"),
    [("Qwen2.5-32B", (2, 4)), ("Llama-2-13b-hf", (1, 2)), ("Meta-Llama-3.1-70B", (4, 8)), ("a model", None)],
)
def test_the_paper_s_t_e_is_found_by_size(name: str, found: tuple[int, int] | None) -> None:
    expected = (None, None) if found is None else found
    assert (expected_tp(name, Variant.SYNCHRONOUS), expected_tp(name, Variant.SHARDED)) == expected


def test_pages_are_shorter_at_a_small_t_and_a_high_rate() -> None:
    lengths = [Arrival(arrived_s=0, input_tokens=400, output_tokens=60)]
    question = Question(
        name="a model",
        model=MODEL,
        gpu=dataclasses.replace(H100, memory_bytes=17 * 10**9),
        num_gpus=2,
        targets=Targets(ttft_s=1e9, tpot_s=1e9),
        arrivals=poisson_arrivals(lengths, rate_per_s=1, count=120, seed=0),
        rows=(32,),
        step_tokens=(512,),
        requests_per_replica=60,
    )

    def steps_at(tp: int):
        return roofline_model(MODEL, H100, tp=tp, host=OWN_HOST, mode=SamplingMode.SHARDED)

    told = list(pressure_points(question, steps_at, rates_per_s=(4.0, 100.0)))
    assert [each.tp for each in told if isinstance(each, Excluded)] == [4, 8]
    points = {
        (point.degree.tp, point.rate_per_s): point for point in told if isinstance(point, PressurePoint)
    }
    assert set(points) == {(1, 4.0), (1, 100.0), (2, 4.0), (2, 100.0)}
    for tp in (1, 2):
        assert points[tp, 4.0].mean_pages_share < points[tp, 100.0].mean_pages_share
    assert points[2, 100.0].peak_pages_share < points[1, 100.0].peak_pages_share
    assert points[1, 100.0].run.pressure.mean_waiting > points[2, 100.0].run.pressure.mean_waiting
    for point in points.values():
        assert 0 < point.mean_pages_share <= point.peak_pages_share <= 1


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with configurations and a trace."""
    for name in ("Llama-2-7b-hf", "Qwen2.5-32B"):
        (tmp_path / f"someone--{name}_config.json").write_text(json.dumps(CONFIG))
    lines = [f"{n / 10},{20 + n},{4 + n % 9},0," for n in range(60)]
    header = "arrived_at,input_tokens,output_tokens,block_size,blocks"
    (tmp_path / "trace.csv").write_text("\n".join((header, *lines)) + "\n")
    return tmp_path


def study(monkeypatch: pytest.MonkeyPatch, files: Path, name: str, *arguments: object) -> dict[str, Any]:
    """The record that a study writes."""
    output = files / "records"
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments), "--output", str(output)])
    runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
    (path,) = output.glob("simulated-*.json")
    record = json.loads(path.read_text())
    assert record["device"]["kind"] == "simulated"
    assert "Nothing was measured on a GPU" in record["note"]
    assert record["series"]
    assert all("simulated (roofline)" in each["metric"] for each in record["series"])
    return record


def test_the_study_of_t_e(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    lengths = ("--input-len", 16, "--output-len", 4, "--gpus", 2)
    models = ("--models", "Llama-2-7b-hf", "Qwen2.5-32B")
    record = study(monkeypatch, files, "simulated_te", "--configs", files, *models, *lengths)
    assert set(record["settings"]["findings"]) == {"paper", "paper, its T3", "own"}
    assert len(list((files / "records").glob("*.svg"))) == 6


def test_the_study_of_contention(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    load = ("--trace", files / "trace.csv", "--rates", 4, 40, "--gpus", 2, "--requests", 20)
    config = files / "someone--Qwen2.5-32B_config.json"
    record = study(monkeypatch, files, "simulated_contention", "--config", config, *load)
    assert {each["subject"] for each in record["series"]} == {"t=1, 2 replicas", "t=2, 1 replicas"}
    assert len(list((files / "records").glob("*.svg"))) == 3


def test_the_table_of_plans(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    load = ("--trace", files / "trace.csv", "--gpus", 2, "--requests", 20, "--rows", 8, "--step-tokens", 128)
    record = study(
        monkeypatch, files, "simulated_plans", "--configs", files, "--models", "Llama-2-7b-hf", *load
    )
    assert len(record["settings"]["plans"]) == 3
