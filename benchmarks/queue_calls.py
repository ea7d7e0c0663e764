"""The scheduler's calls with 10 to 100,000 requests waiting, and with many pages or rows at once, recorded.

The aim: no call grows with the queue, 8,192 pages are evicted within 60 ms, 512 rows end within 2 ms.

    python benchmarks/queue_calls.py
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.sched.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[1]
PAGE_SIZE, VOCAB_SIZE, STOP_ID, SAMPLED_ID = 16, 32_000, 2, 7
ROWS = 64
ROOMY, TIGHT = ROWS * 64, ROWS * 4
"""Pages for all that the rows may grow to, and pages that they outgrow: some are preempted."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--pages", type=int, nargs="+", default=[512, 2_048, 8_192])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def request(index: int, num_tokens: int, *, max_tokens: int) -> Request:
    prompt = np.random.default_rng(index).integers(10, VOCAB_SIZE, size=num_tokens)
    return Request(
        request_id=f"r{index}", prompt_token_ids=prompt, max_tokens=max_tokens, stop_ids=(STOP_ID,)
    )


def scheduler(*, num_pages: int, rows: int, max_len: int) -> Scheduler:
    limits = EngineLimits(
        max_model_len=max_len, vocab_size=VOCAB_SIZE, num_pages=num_pages, page_size=PAGE_SIZE
    )
    return Scheduler(SchedulerConfig(max_rows=rows, max_step_tokens=1 << 20), limits)


def commit(engine: Scheduler, plan: StepPlan) -> None:
    engine.commit(plan, SampledTokens(ids=np.full(plan.num_rows, SAMPLED_ID, np.int32), finished_s=0.0))


def timed(call: Callable[[], object], times: list[float]) -> object:
    """Result of `call`, whose processor seconds are appended to `times`."""
    begin_s = time.thread_time()
    result = call()
    times.append(time.thread_time() - begin_s)
    return result


def step(engine: Scheduler) -> None:
    plan = engine.plan()
    if plan is not None:
        commit(engine, plan)


def queue_times(num_waiting: int, *, runs: int) -> dict[str, list[float]]:
    """Seconds of each call while so many wait, by name."""
    times: dict[str, list[float]] = {
        name: [] for name in ("plan", "preempting plan", "commit", "add", "abort")
    }
    for num_pages in (ROOMY, TIGHT):
        for _ in range(runs):
            engine = scheduler(num_pages=num_pages, rows=ROWS, max_len=2_048)
            for index in range(num_waiting + ROWS):
                engine.add(request(index, 32, max_tokens=1_500))
            for _ in range(5):
                step(engine)
            gc.collect()
            time_calls(engine, times)
    return times


def time_calls(engine: Scheduler, times: dict[str, list[float]]) -> None:
    """Steps, then requests that come last and go, and aborts of some that wait."""
    for _ in range(50):
        preemptions, spent = engine.stats().preemptions, list[float]()
        plan = timed(engine.plan, spent)
        assert isinstance(plan, StepPlan)
        times["preempting plan" if engine.stats().preemptions > preemptions else "plan"] += spent
        timed(lambda plan=plan: commit(engine, plan), times["commit"])
    for index in range(1_000_000, 1_000_050):
        late = request(index, 32, max_tokens=1_500)
        timed(lambda late=late: engine.add(late), times["add"])
        timed(lambda late=late: engine.abort(late.request_id), times["abort"])


def eviction_s(num_pages: int) -> float:
    """Seconds of the plan that evicts so many pages of idle prefixes to start a prompt that fills them."""
    num_tokens = num_pages * PAGE_SIZE
    engine = scheduler(num_pages=num_pages + 8, rows=4, max_len=num_tokens + 64)
    for index in (0, 1):
        engine.add(request(index, num_tokens, max_tokens=1))
        gc.collect()
        spent: list[float] = []
        timed(engine.plan if index else lambda: step(engine), spent)
    return spent[0]


def ending_s(rows: int) -> tuple[float, float]:
    """Seconds of the plan in which so many rows take their last step, and of the commit in which they end."""
    engine = scheduler(num_pages=rows * 16, rows=rows, max_len=2_048)
    for index in range(rows):
        engine.add(request(index, 64, max_tokens=20))
    plans: list[float] = []
    commits: list[float] = []
    gc.collect()
    while engine.has_work:
        plan = timed(engine.plan, plans)
        assert isinstance(plan, StepPlan)
        timed(lambda plan=plan: commit(engine, plan), commits)
    return plans[-1], commits[-1]


def series(options: argparse.Namespace) -> list[Series]:
    found: list[Series] = []

    def add(case: str, metric: str, samples: list[float]) -> None:
        found.append(Series(subject="albireo", case=case, metric=metric, unit="s", samples=tuple(samples)))

    for num_waiting in options.waiting:
        for name, samples in queue_times(num_waiting, runs=options.runs).items():
            if samples:
                add(f"{num_waiting} waiting", name, samples)
    for num_pages in options.pages:
        add(f"{num_pages} pages", "plan that evicts", [eviction_s(num_pages) for _ in range(options.runs)])
    for rows in options.rows:
        plans, commits = zip(*(ending_s(rows) for _ in range(options.runs)), strict=True)
        add(f"{rows} rows end", "plan", list(plans))
        add(f"{rows} rows end", "commit", list(commits))
    return found


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    gc.disable()  # its pauses are measured elsewhere
    result = series(options)
    for one in result:
        best, median = 1e6 * min(one.samples), 1e6 * statistics.median(one.samples)
        print(f"{one.case:>16}  {one.metric:<18} median {median:>10.1f} µs, best {best:>10.1f} µs")
    record = Record(
        name="queue",
        device=cpu_device(),
        settings={key: vars(options)[key] for key in ("waiting", "pages", "rows", "runs")},
        series=result,
        note="Processor time of calls without a device or the collector; 64 rows run beside the queue.",
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
