"""Whole prompts against the flops that they take, in steps of as many tokens as an engine computes at once.

The engine is that of the part before, started again: what it compiled then it finds now.
"""

import statistics

from albireo_jax.launch import Prepared
from benchmarks.gpu_check.ceilings import best_matrix_flops_per_s
from benchmarks.gpu_check.check import LARGE, Check, Sizes
from benchmarks.gpu_check.check_engines import note_start, shared_engine, step_buckets
from benchmarks.gpu_check.steps import admit, prompt_plans, time_prompt, work_of

_LENGTHS = ((64, 128), (2048, 16384))


def run_prefill(check: Check) -> None:
    """Prompts of the large model, the shortest first."""
    rate = best_matrix_flops_per_s(small=check.small)  # while the memory is free
    started = shared_engine(check, LARGE, step_buckets(check))
    note_start(check, "few sizes of steps, once more", started)
    for length in _LENGTHS[not check.small]:
        if check.figures.has_time(f"{LARGE}, {length} tokens"):
            with check.figures.attempt(f"{LARGE}, {length} tokens"):
                _measure(check, started.ready, length=length, rate=rate)


def _measure(check: Check, ready: Prepared, *, length: int, rate: float) -> None:
    chunk = Sizes.of(small=check.small).max_step_tokens
    admit(ready, rows=1, tokens=length + 1)
    plans = prompt_plans(length, chunk=chunk)
    prompt_s = time_prompt(ready.executor, plans)
    flops, case = sum(work_of(ready, plan).flops for plan in plans), f"{length} tokens"
    figures = check.figures
    figures.add(LARGE, case, metric="prompt", unit="ms", samples=[1e3 * seconds for seconds in prompt_s])
    figures.add(LARGE, case, metric="flops", unit="flops", samples=[flops])
    shares = [flops / rate / seconds for seconds in prompt_s]
    figures.add(LARGE, case, metric="share of matrix rate", unit="1", samples=shares)
    print(f"{case}: {statistics.median(shares):.1%} of the matrix rate", flush=True)
