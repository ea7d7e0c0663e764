"""The GPU check: its options and arithmetic here, and all its parts, at tiny sizes, as the slow test."""

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import Dtype, Quantization
from albireo_jax.core.gpu_options import GpuConfig, LayerForm
from albireo_jax.measure.records import Series
from albireo_jax.runtime.batch import Bucket, choose_bucket
from albireo_jax.sim.cost import RankWork
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.planning.calibration import BucketTerms, LoopTerms, SamplingTerms, Shard, StepTable
from benchmarks.gpu_check.__main__ import run_of
from benchmarks.gpu_check.attention_cases import attention_cases, attention_error, attention_step
from benchmarks.gpu_check.carried import FORM
from benchmarks.gpu_check.check import Check, Sizes
from benchmarks.gpu_check.check_engines import carried_form, step_buckets
from benchmarks.gpu_check.check_parts import (
    FAST,
    GOALS,
    RIGHT,
    RUNS,
    CheckRun,
    Goal,
    begin_until_s,
    chosen,
    find_part,
    goal_of,
)
from benchmarks.gpu_check.forms import FORMS, FormTimes, best_form
from benchmarks.gpu_check.golden import GoldenAnswer, parting_margin
from benchmarks.gpu_check.kernel_spans import KernelSpan, idle_share, seconds_by_name
from benchmarks.gpu_check.numerics import equal_selections, equal_tokens
from benchmarks.gpu_check.part_figures import PartSkipped
from benchmarks.gpu_check.part_settings import PartSettings
from benchmarks.gpu_check.rank_tables import carried_on
from benchmarks.gpu_check.record_file import CUT_OFF, DONE, FAILED, RUNNING, SKIPPED, Notes
from benchmarks.gpu_check.runner import RESERVE_S
from benchmarks.gpu_check.steps import (
    DecodeCase,
    admission,
    decode_plans,
    prompt_plans,
    scattered_pages,
)
from benchmarks.gpu_check.trace_part import trace_buckets
from benchmarks.gpu_check.verdicts import is_good, table, verdicts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
SMALL = PartSettings(
    small=True, on_cpu=True, data=None, output="/nowhere", record="/nowhere", carried="/nowhere", peers={}
)
CPU = Check(settings=SMALL, figures=None)  # type: ignore[arg-type]


def run_script(*words: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, words), "--python", sys.executable]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_parts_of_a_run_fit_in_its_time(run: CheckRun) -> None:
    *others, last = run.parts
    assert sum(part.limit_s for part in others) + last.least_s <= run.total_s - RESERVE_S
    assert all(part.least_s <= part.limit_s for part in run.parts)
    assert all(begin_until_s(part.limit_s) < part.limit_s for part in run.parts)


def test_the_two_runs_are_as_long_as_they_may_be() -> None:
    assert (RIGHT.total_s, FAST.total_s) == (210, 450)


def test_parts_can_be_chosen_and_stretched() -> None:
    assert [part.name for part in chosen(FAST, only="trace, decode").parts] == ["decode", "trace"]
    stretched = chosen(FAST, only="decode", stretch=3.0)
    plain = find_part(FAST, "decode")
    assert (stretched.parts[0].limit_s, stretched.total_s) == (3 * plain.limit_s, 3 * FAST.total_s)
    with pytest.raises(ValueError, match="'nothing' is not known to 'right'; known are device, golden"):
        chosen(RIGHT, only="golden,nothing")
    with pytest.raises(ValueError, match="above 0, got 0"):
        chosen(RIGHT, stretch=0.0)


def test_every_goal_is_of_a_figure_of_some_part() -> None:
    parts = {part.name: part for run in RUNS.values() for part in run.parts}
    assert len(parts) == sum(len(run.parts) for run in RUNS.values())
    assert all(goal.metric in parts[goal.part].shown for goal in GOALS)
    assert all(goal.at_least is not None or goal.at_most is not None for goal in GOALS)


def test_the_script_refuses_bad_options_and_plans_without_jax() -> None:
    bad = run_script("right", "--only", "golden,nothing")
    assert bad.returncode == 2
    assert "known are device" in bad.stderr
    assert run_script("right", "--device", "abacus").returncode == 2
    unknown = run_script("fast", "--peer", "sglang=/bin/true")
    assert unknown.returncode == 2
    assert "known are ['transformers', 'llama.cpp', 'vllm']" in unknown.stderr
    assert "no program for vllm at '/no/where'" in run_script("fast", "--peer", "vllm=/no/where").stderr
    program = "import sys; import benchmarks.gpu_check.check_parts; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


def test_a_part_without_its_data_is_skipped_aloud_and_recorded(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--small", "--output", tmp_path, "--prepared", tmp_path / "none")
    done = run_script("fast", "--only", "trace", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["parts"]["trace"]["status"] == SKIPPED
    assert "it needs --data" in record["parts"]["trace"]["reason"]
    assert record["series"] == []
    assert "SKIPPED trace" in path.with_suffix(".log").read_text()


def test_goals_cover_the_cases_that_they_name() -> None:
    roofline = "share of byte roofline"
    goal = goal_of("decode", ("llama-3.1-8b", "64 rows, 1024 context", roofline))
    assert goal is not None
    assert (goal.text, goal.is_met(0.85), goal.is_met(0.849)) == (">= 0.85", True, False)
    assert goal_of("decode", ("llama-3.1-8b", "256 rows, 1024 context", roofline)) is None
    assert goal_of("decode", ("qwen3-0.6b", "64 rows, 1024 context", roofline)) is None
    assert goal_of("prefill", ("llama-3.1-8b", "64 rows, 1024 context", roofline)) is None
    goal = goal_of("sampling", ("sampling", "greedy", "share of equal tokens"))
    assert goal is not None
    assert not goal.is_met(0.99)


def figure(metric: str, value: float) -> Series:
    return Series(subject="s", case="c", metric=metric, unit="1", samples=(value,))


SLOW = Goal(part="decode", metric="speed", at_least=1.0)
WRONG = Goal(part="decode", metric="error", at_most=0.0, everywhere=True)


@pytest.mark.parametrize(("on_cpu", "met"), [(True, None), (False, False)])
def test_speed_is_judged_on_gpus_only_and_never_fails(on_cpu: bool, met: bool | None) -> None:
    notes = Notes(part="decode", status=DONE, series=(figure("speed", 0.5),))
    (verdict,) = verdicts(notes, on_cpu=on_cpu, goals=[SLOW, WRONG])
    assert (verdict.met, verdict.fails) == (met, False)


def test_what_is_wrong_fails_everywhere() -> None:
    notes = Notes(part="decode", status=DONE, series=(figure("error", 0.5), figure("error", float("nan"))))
    assert [each.fails for each in verdicts(notes, on_cpu=True, goals=[SLOW, WRONG])] == [True, True]


@pytest.mark.parametrize(
    ("status", "good"), [(DONE, True), (SKIPPED, True), (FAILED, False), (RUNNING, False), (CUT_OFF, False)]
)
def test_a_check_is_as_good_as_its_parts(status: str, good: bool) -> None:
    notes = [Notes(part="decode", status=DONE), Notes(part="prefill", status=status, reason="why")]
    assert is_good(notes, on_cpu=False) == good
    text = table(chosen(FAST, only="decode,prefill").parts, notes, on_cpu=False)
    assert status in text.splitlines()[-1]


def test_the_best_form_is_the_quickest_and_of_those_alike_the_first_compiled(tmp_path: Path) -> None:
    def best(*times: tuple[float, float]) -> int:
        found = [FormTimes(form, *each) for form, each in zip(FORMS, times, strict=False)]
        return FORMS.index(best_form(found))

    assert best((9.0, 1.0)) == 0
    assert best((1.0, 1.2), (9.0, 1.0)) == 1
    assert best((9.0, 1.0), (1.0, 1.04), (5.0, 1.01)) == 1
    assert best((9.0, 1.0), (8.0, 1.1), (1.0, 0.95)) == 0  # whole models take too long to compile so
    assert best((9.0, 1.0), (8.0, 1.1), (1.0, 0.7)) == 2
    assert carried_form(tmp_path, None) == GpuConfig()
    form = FORMS[-1].options
    (tmp_path / FORM).write_text(json.dumps(asdict(form)))
    assert carried_form(tmp_path, None) == form
    assert form.layer_form is LayerForm.STACKED
    assert carried_form(tmp_path, Quantization.INT8) == replace(form, product_library=None)


def test_idle_time_is_what_no_kernel_covers() -> None:
    draw = random.Random(0)
    for _ in range(50):
        begins = [draw.randrange(200) for _ in range(draw.randint(1, 20))]
        spans = [KernelSpan(begin, begin + draw.randint(1, 30)) for begin in begins]
        busy = {moment for span in spans for moment in range(int(span.begin_ns), int(span.end_ns))}
        whole = max(busy) + 1 - min(busy)
        assert idle_share(spans) == pytest.approx(1 - len(busy) / whole)
    with pytest.raises(ValueError, match="no kernel"):
        idle_share([])


def test_time_of_kernels_is_summed_by_name() -> None:
    spans = [KernelSpan(0, 1e9, "small"), KernelSpan(1e9, 3e9, "large"), KernelSpan(5e9, 5.5e9, "small")]
    assert list(seconds_by_name(spans).items()) == [("large", 2.0), ("small", 1.5)]


def test_tables_of_shallow_ranks_are_carried_on_along_a_line() -> None:
    task = TaskTerms(step_s=1e-5, row_s=1e-6)
    host = HostTerms(schedule=task, prepare=task, process=task, source="known")
    sampling = SamplingTerms(rows=(4,), greedy_s=(1e-5,), filtered_s=(2e-5,))

    def shard(layers: int) -> Shard:
        buckets = tuple(
            BucketTerms(tokens=tokens, rows=4, step_s=3e-4 + tokens * 2e-5 * layers, samples=5)
            for tokens in (4, 32)
        )
        steps = StepTable(buckets=buckets, row_pair_s=1e-9 * layers, chunk_pair_s=2e-9 * layers)
        loops = (LoopTerms(depth=2, steps=steps, host=host),)
        return Shard(tp=2, is_shard_shaped=True, loops=loops, sampling=sampling)

    carried = carried_on(shard(2), shard(4), layers=(2, 4, 80))
    for got, want in zip(carried.loops[0].steps.buckets, shard(80).loops[0].steps.buckets, strict=True):
        assert got.step_s == pytest.approx(want.step_s)
    assert carried.loops[0].steps.row_pair_s == pytest.approx(80e-9)
    assert carried.loops[0].steps.chunk_pair_s == pytest.approx(160e-9)


def test_steps_are_those_that_the_runtime_pads_and_the_arithmetic_counts() -> None:
    model, case = CPU.shape("llama-3.1-8b"), DecodeCase(rows=3, context=40)
    pages = scattered_pages(3, 48, page_size=16, num_pages=9)
    assert sorted(page for own in pages for page in own) == list(range(1, 10))
    with pytest.raises(ValueError, match="3 rows of 49 tokens take 12 pages, there are 11"):
        scattered_pages(3, 49, page_size=16, num_pages=11)
    buckets = (Bucket(3, 3), Bucket(32, 8))
    admitting = admission(pages)
    assert [params.pages for params in admitting.new_slots] == pages
    assert choose_bucket(admitting, buckets) == buckets[1]
    prompt = prompt_plans(50, chunk=20)
    assert [plan.starts.tolist() for plan in prompt] == [[0], [20], [40]]
    assert [len(plan.token_ids) for plan in prompt] == [plan.counts.item() for plan in prompt] == [20, 20, 10]
    assert {choose_bucket(plan, buckets) for plan in prompt} == {buckets[1]}
    plans = decode_plans(case, steps=4)
    assert {choose_bucket(plan, buckets) for plan in plans} == {buckets[0]}
    work = RankWork(model, tp=1, dtype=Dtype.BFLOAT16)
    sizes = [work.of(plan).memory_bytes for plan in plans]
    token_bytes = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    assert np.diff(sizes).tolist() == [case.rows * token_bytes] * 3
    fewer = work.of(decode_plans(replace(case, rows=1), steps=1)[0]).memory_bytes
    logit_bytes = 2 * 4 * model.vocab_size
    assert sizes[0] - fewer == 2 * (token_bytes * (case.context + 2) + logit_bytes)


def test_shared_engines_take_what_their_parts_plan() -> None:
    buckets, sizes = step_buckets(CPU), Sizes.of(small=True)
    assert max(bucket.tokens for bucket in buckets) == sizes.max_step_tokens
    assert all(bucket.rows <= sizes.max_rows for bucket in buckets)
    (prompt,) = prompt_plans(sizes.max_step_tokens, chunk=sizes.max_step_tokens)
    assert choose_bucket(prompt, buckets) == buckets[-1]


def test_buckets_of_the_trace_hold_whatever_its_engine_may_plan() -> None:
    for sizes in (Sizes(max_rows=256, max_step_tokens=2048, max_model_len=100), Sizes.of(small=True)):
        buckets = trace_buckets(sizes)
        assert all(bucket.is_decode or bucket.tokens >= 2 * bucket.rows for bucket in buckets)
        assert max(bucket.tokens for bucket in buckets if not bucket.is_decode) == sizes.max_step_tokens
        for decodes in (True, False):
            assert max(each.rows for each in buckets if each.is_decode == decodes) == sizes.max_rows


def test_a_check_without_data_skips_what_needs_it() -> None:
    with pytest.raises(PartSkipped, match="--data"):
        CPU.data_folder()


def test_answers_part_at_the_first_token_that_differs() -> None:
    golden = GoldenAnswer(input_ids=(1,), output_ids=(5, 6, 7), margins=(3.0, 0.25, 2.0))
    assert parting_margin(golden, [5, 6, 7]) is None
    assert parting_margin(golden, [5, 9, 1]) == 0.25


def test_attention_is_compared_where_reading_what_no_row_owns_would_show() -> None:
    case = next(each for each in attention_cases(small=True) if each.kv_dtype == "bfloat16")
    assert attention_error(case, seed=0) < 0.03
    step = attention_step(case, seed=0)
    finite = np.isfinite(np.asarray(step.cache.k_LPSNK, np.float32)).all(axis=(0, 3, 4))
    context_tokens = int(step.rows["context_R"].sum())
    assert finite.sum() == context_tokens < finite.size


def test_sampled_tokens_are_compared_where_rows_draw_differently() -> None:
    assert equal_tokens(CPU, "drawn, unfiltered", rows=8) == 1.0
    assert equal_selections(CPU, "drawn, filtered", rows=8) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_part_runs_on_a_cpu(run: CheckRun, data_dir: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--small", "--data", data_dir, "--output", tmp_path)
    done = run_script(run.name, *options, "--prepared", tmp_path / "none", timeout_s=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-check-*.json")
    record = json.loads(path.read_text())
    assert {name: part["status"] for name, part in record["parts"].items()} == {
        part.name: DONE for part in run.parts
    }
    assert {one["subject"].partition(":")[0] for one in record["series"]} == set(record["parts"])
    assert (tmp_path / "carried.tar.gz").stat().st_size > 1000


def test_every_part_has_a_function() -> None:
    for run in RUNS.values():
        for part in run.parts:
            assert callable(run_of(part.name)), part.name
