"""Times plan and commit of our scheduler in steady decode, without a device, for `scheduler_calls`."""

from collections import deque
from time import perf_counter
from typing import Any

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.engine.interpreter import release_interpreter, settle_interpreter
from albireo_jax.measure.worker_channel import WorkerChannel
from albireo_jax.sched.scheduler import Scheduler
from benchmarks.peers.workers.worker_options import hello

PAGE_SIZE = 16
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000


def loaded_scheduler(rows: int, prompt_len: int, depth: int) -> Scheduler:
    """A scheduler with `rows` requests that would go on to the model's limit."""
    limits = EngineLimits(
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        num_pages=rows * MAX_MODEL_LEN // PAGE_SIZE,
        page_size=PAGE_SIZE,
    )
    scheduler = Scheduler(SchedulerConfig(max_rows=rows, max_step_tokens=8192, depth=depth), limits)
    rng = np.random.default_rng(0)
    for row in range(rows):
        prompt = rng.integers(0, VOCAB_SIZE, prompt_len).astype(np.int32)
        scheduler.add(
            Request(
                request_id=f"request-{row}", prompt_token_ids=prompt, max_tokens=MAX_MODEL_LEN - prompt_len
            )
        )
    return scheduler


def sampled(plan: StepPlan) -> SampledTokens:
    """The result that an executor would give for `plan`."""
    return SampledTokens(ids=np.full(plan.num_rows, 7, np.int32), finished_s=0.0)


def measure(question: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every plan and commit of `steps` decode steps, `depth` of them in flight, after warm-up."""
    rows, depth = question["rows"], question["depth"]
    settle_interpreter()  # before there are requests, as `launch` does
    scheduler = loaded_scheduler(rows, question["prompt_len"], depth)
    in_flight: deque[StepPlan] = deque()
    plan_s: list[float] = []
    commit_s: list[float] = []
    while len(commit_s) < question["steps"]:
        begin = perf_counter()
        plan = scheduler.plan()
        planned = perf_counter()
        assert plan is not None, "all requests decode"
        in_flight.append(plan)
        if len(in_flight) < depth:
            continue
        oldest = in_flight.popleft()
        ids = sampled(oldest)
        commit = perf_counter()
        outputs = scheduler.commit(oldest, ids)
        committed = perf_counter()
        if oldest.num_tokens == len(outputs) == rows and oldest.step >= question["warmup"]:
            plan_s.append(planned - begin)
            commit_s.append(committed - commit)
    release_interpreter()
    return {"plan_s": plan_s, "commit_s": commit_s}


if __name__ == "__main__":
    WorkerChannel().serve(hello("albireo-jax", "numpy"), measure)
