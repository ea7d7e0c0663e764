"""The GPU check: its options and arithmetic here, and all its parts, at tiny sizes, as the slow test."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import Dtype
from albireo_jax.experiments.gpu_check.check import Check, Sizes
from albireo_jax.experiments.gpu_check.golden import GoldenAnswer, parting_margin
from albireo_jax.experiments.gpu_check.kernels import Span, idle_share
from albireo_jax.experiments.gpu_check.notebook import (
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    Notebook,
    Notes,
    PartSkipped,
    read_notes,
)
from albireo_jax.experiments.gpu_check.numerics import attention_cases, attention_error, attention_step
from albireo_jax.experiments.gpu_check.parts import GOALS, PARTS, TOTAL_S, Goal, chosen, goal_of
from albireo_jax.experiments.gpu_check.report import is_good, table, verdicts
from albireo_jax.experiments.gpu_check.shards import carried_on
from albireo_jax.experiments.gpu_check.steps import (
    DecodeCase,
    admission,
    decode_plans,
    prompt_plan,
    scattered_pages,
)
from albireo_jax.experiments.gpu_check.trace import trace_buckets
from albireo_jax.experiments.records import Series
from albireo_jax.runtime.batch import Bucket, choose_bucket
from albireo_jax.sim.calibration import BucketTerms, LoopTerms, SamplingTerms, Shard, StepTable
from albireo_jax.sim.cost import RankWork
from albireo_jax.sim.host import HostTerms, TaskTerms

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
CPU = Check(small=True, on_cpu=True, data=None, output=ROOT, notebook=None)  # type: ignore[arg-type]


def run_script(*words: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), "--python", sys.executable, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s)


def test_the_parts_fit_in_nine_minutes_and_can_be_chosen() -> None:
    assert sum(part.limit_s for part in chosen(None)) <= TOTAL_S - 20  # for what lies between them
    assert [part.name for part in chosen("decode, ceilings")] == ["ceilings", "decode"]
    (stretched,) = chosen("decode", stretch=3.0)
    (plain,) = chosen("decode")
    assert (stretched.limit_s, stretched.deadline_s) == (3 * plain.limit_s, 3 * plain.deadline_s)
    assert plain.deadline_s < plain.limit_s
    with pytest.raises(ValueError, match="'nothing' is not known; known are ceilings, numerics"):
        chosen("decode,nothing")
    with pytest.raises(ValueError, match="above 0, got 0"):
        chosen(None, stretch=0.0)


def test_every_goal_is_of_a_figure_that_the_table_shows() -> None:
    shown = {part.name: part.shown for part in PARTS}
    assert all(goal.metric in shown[goal.part] for goal in GOALS)
    assert all(goal.at_least is not None or goal.at_most is not None for goal in GOALS)


def test_the_script_refuses_bad_options_and_plans_without_jax() -> None:
    bad = run_script("--only", "decode,nothing")
    assert bad.returncode == 2
    assert "known are ceilings" in bad.stderr
    assert run_script("--device", "abacus").returncode == 2
    unknown = run_script("--peer", "sglang=/bin/true")
    assert unknown.returncode == 2
    assert "known are ['transformers', 'llama.cpp', 'vllm']" in unknown.stderr
    assert "no program for vllm at '/no/where'" in run_script("--peer", "vllm=/no/where").stderr
    program = "import sys; import albireo_jax.experiments.gpu_check.parts; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


def test_a_part_without_its_data_is_skipped_aloud_and_recorded(tmp_path: Path) -> None:
    done = run_script("--only", "trace", "--device", "cpu", "--small", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "SKIPPED trace: it needs --data" in done.stdout
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["settings"]["parts"]["trace"]["status"] == SKIPPED
    assert record["series"] == []


def test_goals_cover_the_cases_that_they_name() -> None:
    roofline = "share of byte roofline"
    goal = goal_of("decode", ("llama-3.1-8b", "64 rows, 1024 context", roofline))
    assert goal is not None
    assert (goal.text, goal.is_met(0.85), goal.is_met(0.849)) == (">= 0.85", True, False)
    assert goal_of("decode", ("llama-3.1-8b", "256 rows, 1024 context", roofline)) is None
    assert goal_of("decode", ("qwen3-0.6b", "64 rows, 1024 context", roofline)) is None
    assert goal_of("prefill", ("llama-3.1-8b", "64 rows, 1024 context", roofline)) is None
    goal = goal_of("numerics", ("sampling", "greedy", "share of equal tokens"))
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
    ("status", "good"), [(DONE, True), (SKIPPED, True), (FAILED, False), (RUNNING, False)]
)
def test_a_check_is_as_good_as_its_parts(status: str, good: bool) -> None:
    notes = [Notes(part="ceilings", status=DONE), Notes(part="decode", status=status, reason="why")]
    assert is_good(notes, on_cpu=False) == good
    text = table(chosen("ceilings,decode"), notes, on_cpu=False)
    assert ("cut off" if status == RUNNING else status) in text.splitlines()[-1]


def test_a_part_that_is_cut_off_keeps_its_figures(tmp_path: Path) -> None:
    now_s = [0.0]
    notebook = Notebook("decode", tmp_path, deadline_s=10.0, clock=lambda: now_s[0])
    notebook.add("s", "c", metric="step", unit="ms", samples=[1.0, 3.0])
    assert notebook.has_time("the next")
    now_s[0] = 11.0
    assert not notebook.has_time("the last")
    notes = read_notes(tmp_path, "decode")
    assert (notes.status, notes.seconds) == (RUNNING, 11.0)
    assert notes.left_out == ("the last: the part's 10 s are over",)
    assert notes.series[0].median == 2.0
    notebook.close(DONE)
    assert read_notes(tmp_path, "decode").status == DONE
    assert read_notes(tmp_path, "prefill").status == FAILED


def test_idle_time_is_what_no_kernel_covers() -> None:
    draw = random.Random(0)
    for _ in range(50):
        begins = [draw.randrange(200) for _ in range(draw.randint(1, 20))]
        spans = [Span(begin, begin + draw.randint(1, 30)) for begin in begins]
        busy = {moment for span in spans for moment in range(int(span.begin_ns), int(span.end_ns))}
        whole = max(busy) + 1 - min(busy)
        assert idle_share(spans) == pytest.approx(1 - len(busy) / whole)
    with pytest.raises(ValueError, match="no kernel"):
        idle_share([])


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
    assert choose_bucket(prompt_plan(20), buckets) == buckets[1]
    plans = decode_plans(case, steps=4)
    assert {choose_bucket(plan, buckets) for plan in plans} == {buckets[0]}
    work = RankWork(model, tp=1, dtype=Dtype.BFLOAT16)
    sizes = [work.of(plan).memory_bytes for plan in plans]
    token_bytes = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    assert np.diff(sizes).tolist() == [case.rows * token_bytes] * 3
    fewer = work.of(decode_plans(replace(case, rows=1), steps=1)[0]).memory_bytes
    logit_bytes = 2 * 4 * model.vocab_size
    assert sizes[0] - fewer == 2 * (token_bytes * (case.context + 2) + logit_bytes)


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


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(data_dir: Path, tmp_path: Path) -> None:
    hlo = tmp_path / "hlo.txt.gz"
    done = run_script(
        *("--device", "cpu", "--small", "--data", data_dir, "--output", tmp_path / "out", "--dump-hlo", hlo),
        timeout_s=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("gpu-check-*.json")
    record = json.loads(path.read_text())
    parts = record["settings"]["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {part.name: DONE for part in PARTS}
    assert {one["subject"].partition(":")[0] for one in record["series"]} == set(parts)
    assert list((tmp_path / "out").glob("calibration-*.json"))
    assert hlo.stat().st_size > 1000
