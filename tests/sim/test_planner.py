"""Plans: laws of goodput, what fits, and what is said of what does not."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from albireo_jax.core.config import Dtype, SamplingMode
from albireo_jax.core.memory import page_bytes, rules_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.sim.gpus import GPUS, Gpu
from albireo_jax.sim.host import OWN_HOST, HostTerms
from albireo_jax.sim.planning.plan_report import as_json, config_yaml, lines, rows
from albireo_jax.sim.planning.plan_sizes import Question, fit, read_workload, replica_requests
from albireo_jax.sim.planning.planner import RATES_PER_OCTAVE, NoPlanError, Plan, make_plan
from albireo_jax.sim.replica import Replica, Targets, meets, run, scaled_arrivals
from albireo_jax.sim.step_model import Efficiency, StepModel, roofline_model
from albireo_jax.sim.workload import Arrival, poisson_arrivals

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32_000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
H100 = GPUS["h100"]
LENGTHS = [
    Arrival(arrived_s=0, input_tokens=count, output_tokens=answer)
    for count, answer in ((50, 10), (300, 40), (900, 20), (100, 60))
]
TRACE = tuple(poisson_arrivals(LENGTHS, rate_per_s=5.0, count=320, seed=3))
ONE_STEP = 2 ** (1 / RATES_PER_OCTAVE)


def question(*, ttft_s: float = 0.1, tpot_s: float = 0.01, **changes: object) -> Question:
    asked = Question(
        name="a model",
        model=MODEL,
        gpu=H100,
        num_gpus=4,
        targets=Targets(ttft_s=ttft_s, tpot_s=tpot_s),
        arrivals=TRACE,
        rows=(16, 64),
        step_tokens=(256, 1024),
        requests_per_replica=80,
    )
    return dataclasses.replace(asked, **changes)


def steps(tp: int, *, gpu: Gpu = H100, host: HostTerms = OWN_HOST) -> StepModel:
    return roofline_model(MODEL, gpu, tp=tp, host=host, mode=SamplingMode.SHARDED)


@pytest.fixture(scope="module")
def answer() -> Plan:
    return make_plan(question(), steps)


@pytest.mark.parametrize("tpot_s", [0.003, 0.01])
def test_the_best_plan_meets_its_targets_and_not_at_the_next_rate_that_would_last(tpot_s: float) -> None:
    answer = make_plan(question(tpot_s=tpot_s), steps)
    best, targets = answer.best, answer.question.targets

    def share(rate: float) -> float:
        replica = Replica(config=best.config, limits=best.degree.limits, steps=steps(best.degree.tp))
        requests = replica_requests(answer.question, answer.workload)
        outcome = run(replica, scaled_arrivals(requests, rate_per_s=rate / best.degree.replicas)).outcome
        return outcome.share_meeting(ttft_s=targets.ttft_s, tpot_s=targets.tpot_s)

    assert share(best.rate_per_s) >= targets.attainment
    assert best.rate_per_s <= best.lasting_per_s
    if best.rate_per_s < best.lasting_per_s:
        assert share(best.rate_per_s * ONE_STEP) < targets.attainment
    else:
        assert tpot_s > 0.003
    assert best.rate_per_s == max(each.rate_per_s for each in answer.served)


def test_the_same_question_has_the_same_answer(answer: Plan) -> None:
    assert as_json(make_plan(question(), steps)) == as_json(answer)


def test_tighter_targets_never_serve_more_and_raise_t() -> None:
    """Within a step of the grid, since plans are chosen by a part of the requests."""
    answers = [
        make_plan(question(ttft_s=ttft_s, tpot_s=tpot_s), steps)
        for ttft_s, tpot_s in ((0.2, 0.02), (0.1, 0.008), (0.05, 0.0045))
    ]
    rates = [each.best.rate_per_s for each in answers]
    assert rates[0] * ONE_STEP >= rates[1]
    assert rates[1] * ONE_STEP >= rates[2]
    degrees = [each.best.degree.tp for each in answers]
    assert degrees == sorted(degrees)
    assert degrees[0] < degrees[-1]


def test_a_load_that_is_served_is_served_with_looser_targets_and_by_faster_devices() -> None:
    asked = question()
    (degree,) = [each for each in fit(asked, read_workload(asked)).fitting if each.tp == 2]
    fast = dataclasses.replace(H100, flops_per_s=2 * H100.flops_per_s, bytes_per_s=2 * H100.bytes_per_s)
    config = make_plan(question(degrees=(2,)), steps).best.config
    requests = replica_requests(asked, read_workload(asked))
    served = 0
    for exponent in (4, 5, 6, 7, 8, 9):
        load = scaled_arrivals(requests, rate_per_s=2.0**exponent)
        usual, doubled = (
            Replica(config=config, limits=degree.limits, steps=steps(2, gpu=gpu)) for gpu in (H100, fast)
        )
        if meets(usual, load, asked.targets):
            served += 1
            loose = Targets(ttft_s=2 * asked.targets.ttft_s, tpot_s=2 * asked.targets.tpot_s)
            assert meets(usual, load, loose)
            assert meets(doubled, load, asked.targets)
    assert 0 < served < 6


def test_twice_the_speed_never_lowers_the_goodput(answer: Plan) -> None:
    fast = dataclasses.replace(H100, flops_per_s=2 * H100.flops_per_s, bytes_per_s=2 * H100.bytes_per_s)
    quick = make_plan(question(gpu=fast), lambda tp: steps(tp, gpu=fast))
    for slow, better in zip(answer.served, quick.served, strict=True):
        assert better.rate_per_s * ONE_STEP >= slow.rate_per_s


def test_whether_a_load_is_served_is_what_its_run_says(answer: Plan) -> None:
    best, targets = answer.best, answer.question.targets
    replica = Replica(config=best.config, limits=best.degree.limits, steps=steps(best.degree.tp))
    requests = replica_requests(answer.question, answer.workload)
    verdicts = set()
    for factor in (0.5, 0.9, 1.0, 1.1, 1.5, 4.0):
        load = scaled_arrivals(requests, rate_per_s=factor * best.rate_per_s / best.degree.replicas)
        outcome = run(replica, load).outcome
        met = outcome.share_meeting(ttft_s=targets.ttft_s, tpot_s=targets.tpot_s) >= targets.attainment
        assert meets(replica, load, targets) is met
        verdicts.add(met)
    assert verdicts == {True, False}


def test_devices_are_never_busier_than_all_the_time(answer: Plan) -> None:
    for each in answer.served:
        for done in (each.run, each.beyond):
            assert 0 < done.busy_share <= 1 + 1e-9
            assert done.tasks.device_busy_s <= done.tasks.wall_s + 1e-9
            assert done.pressure.peak_pages <= done.pressure.num_pages


def test_arrivals_keep_their_rhythm() -> None:
    requests = replica_requests(question(), read_workload(question()))
    scaled = scaled_arrivals(requests, rate_per_s=10.0)
    assert scaled[-1].arrived_s == pytest.approx((len(scaled) - 1) / 10)
    gaps = [b.arrived_s - a.arrived_s for a, b in pairwise(requests)]
    stretched = [b.arrived_s - a.arrived_s for a, b in pairwise(scaled)]
    factor = stretched[0] / gaps[0]
    assert stretched == pytest.approx([factor * gap for gap in gaps])
    at_once = [dataclasses.replace(each, arrived_s=0.0) for each in requests]
    assert [each.arrived_s for each in scaled_arrivals(at_once, rate_per_s=2.0)[:3]] == [0, 0.5, 1.0]


def test_a_replica_s_requests_are_spread_over_the_beginning_of_the_trace() -> None:
    asked = question()
    requests = replica_requests(asked, read_workload(asked))
    assert [each.arrived_s for each in requests] == [each.arrived_s for each in TRACE[::4]]
    short = question(requests_per_replica=100)
    requests = replica_requests(short, read_workload(short))
    assert [each.arrived_s for each in requests] == [each.arrived_s for each in TRACE[:300:3]]


def test_plans_respect_the_memory_of_a_gpu(answer: Plan) -> None:
    asked = answer.question
    for each in answer.served:
        memory = each.degree.memory
        counts = rules_bytes(MODEL, tp=each.degree.tp, num_slots=each.config.max_rows + 1)
        used = memory.weight_bytes + (memory.num_pages + 1) * memory.page_bytes + counts
        assert used <= asked.memory_share * asked.gpu.memory_bytes
        assert each.degree.tp * each.degree.replicas == asked.num_gpus


def test_what_does_not_fit_is_excluded_with_the_reason() -> None:
    small = dataclasses.replace(H100, memory_bytes=14 * 10**9)
    asked = question(gpu=small, num_gpus=6)
    degrees = fit(asked, read_workload(asked))
    assert [each.tp for each in degrees.fitting] == [2]
    reasons = {each.tp: each.reason for each in degrees.excluded}
    assert "GB of weights a GPU do not fit in 12.6 GB" in reasons[1]
    assert reasons[4] == "6 GPUs are no multiple of 4"


def test_a_cache_that_holds_no_longest_request_is_excluded() -> None:
    weights = weight_bytes(MODEL, tp=1, dtype=Dtype.BFLOAT16)
    counts = rules_bytes(MODEL, tp=1, num_slots=65)
    page = page_bytes(MODEL, tp=1, page_size=16, dtype=Dtype.BFLOAT16)
    tight = dataclasses.replace(H100, memory_bytes=weights + counts + 50 * page)
    asked = question(gpu=tight, num_gpus=1, memory_share=1.0)
    with pytest.raises(ValueError, match=r"room for \d+ tokens, the longest request of the trace has 920"):
        fit(asked, read_workload(asked))


def test_a_model_that_fits_nowhere_is_answered_with_what_would_do() -> None:
    small = dataclasses.replace(H100, memory_bytes=8 * 10**9)
    with pytest.raises(
        ValueError, match=r"fits on 2 x .* at no t\. t=1: .* Its weights fit at t=4, on 4 GPUs"
    ):
        make_plan(question(gpu=small, num_gpus=2), steps)
    tiny = dataclasses.replace(H100, memory_bytes=10**9)
    with pytest.raises(ValueError, match=r"a GPU needs more than 2 GB of memory"):
        make_plan(question(gpu=tiny), steps)


@pytest.mark.parametrize("arrivals", [(), (TRACE[0],)], ids=["none", "one"])
def test_too_short_a_trace_is_refused(arrivals: tuple[Arrival, ...]) -> None:
    with pytest.raises(ValueError, match="a plan needs"):
        make_plan(question(arrivals=arrivals), steps)


def test_requests_that_a_server_refuses_are_left_out_and_counted() -> None:
    long = Arrival(arrived_s=1.0, input_tokens=4000, output_tokens=97)
    empty = Arrival(arrived_s=2.0, input_tokens=0, output_tokens=5)
    workload = read_workload(question(arrivals=(*TRACE, long, empty)))
    assert (workload.num_too_long, workload.num_empty, len(workload.arrivals)) == (1, 1, len(TRACE))
    with pytest.raises(
        ValueError, match="3 are longer than the model's context of 4096 tokens and 0 are empty"
    ):
        read_workload(question(arrivals=(long,) * 3))


def test_targets_that_no_plan_meets_are_answered_with_the_best_latencies() -> None:
    with pytest.raises(
        NoPlanError, match=r"0.1 ms a token .* ms to the first token at best \(t=4\)"
    ) as refused:
        make_plan(question(tpot_s=1e-4), steps)
    assert "ms a token at best (t=4)" in str(refused.value)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_targets_must_be_times(wrong: float) -> None:
    with pytest.raises(ValueError, match="the ttft target must be above 0 ms"):
        Targets(ttft_s=wrong, tpot_s=1.0)


def test_every_line_with_a_figure_says_that_it_is_simulated(answer: Plan) -> None:
    said = lines(answer)
    for line in said:
        if "requests/s" in line or "device busy" in line:
            assert "simulated (roofline)" in line
    assert any("assumed, not measured" in line for line in said)
    assert all(row.label == "simulated (roofline)" for row in rows(answer))
    content = json.loads(json.dumps(as_json(answer)))
    assert content["best"]["requests_per_s"] == answer.best.rate_per_s
    assert [row["tp"] for row in content["degrees"]] == [1, 2, 4, 8]
    assert content["rule_of_thumb_tp"] == 1


def test_the_emitted_file_holds_the_plan(answer: Plan) -> None:
    content = yaml.safe_load(config_yaml(answer))
    assert content["tp"] == answer.best.degree.tp
    assert content["max-rows"] == answer.best.config.max_rows
    assert content["max-step-tokens"] == answer.best.config.max_step_tokens


def test_efficiency_scales_the_goodput(answer: Plan) -> None:
    def halved(tp: int) -> StepModel:
        return roofline_model(
            MODEL,
            H100,
            tp=tp,
            host=OWN_HOST,
            mode=SamplingMode.SHARDED,
            efficiency=Efficiency(flops=0.3, memory=0.375),
        )

    assert make_plan(question(), halved).best.rate_per_s < answer.best.rate_per_s


def test_the_trace_file_is_named_when_it_cannot_be_read(tmp_path: Path) -> None:
    from albireo_jax.sim.workload import read_trace

    path = tmp_path / "trace.csv"
    for text, message in (("a,b\n1,2\n", "no column arrived_at"), ("", "no column")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"trace\.csv cannot be read as a trace: it has {message}"):
            read_trace(path)
    path.write_text("arrived_at,input_tokens,output_tokens,block_size,blocks\n0.0,x,1,0,\n")
    with pytest.raises(ValueError, match=r"trace\.csv cannot be read as a trace"):
        read_trace(path)
