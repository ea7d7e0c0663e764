"""Where the time of a decode step goes, by stage and by kind of operation, from a trace.

Serves random prompts, traces decode steps, and looks up each traced operation in the compiled step: the
stage is the `jax.named_scope` it came from, the kind is what XLA made of it. Operations run one after the
other, each on both cores where it can, so their times add up; what is left of the step is XLA's scheduling
and the host. Beside it: the time of one pass over the weights, and of one over the cached tokens, at the
bandwidth measured in the same run, which no step can beat.

    python -m benchmarks.peers.make_bench_model MODELS
    python -m benchmarks.profile_step MODELS/llama60m-float32 --dtype float32 --rows 16 32
"""

import random
import re
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from albireo_jax import LLM, SamplingParams
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.runtime.batch import Bucket
from benchmarks.lib.hlo import parse
from benchmarks.lib.recording import Recording, script_parser
from benchmarks.lib.xla_trace import traced_events

STAGES = ("inputs", "projections", "attention", "mlp", "logits", "sample")
CONTROL = ("while", "conditional", "call", "tuple", "get-tuple-element", "parameter", "bitcast", "constant")
OP_NAME = re.compile(r'op_name="([^"]*)"')


class Operation(NamedTuple):
    """An instruction of the compiled step: the stage it belongs to, and what XLA made of it."""

    stage: str
    kind: str


def operations(text: str) -> dict[str, Operation]:
    """The instructions of a compiled program by name."""
    found: dict[str, Operation] = {}
    for one in parse(text).instructions():
        if one.opcode in CONTROL:
            continue
        scope = OP_NAME.search(one.text)
        parts = scope.group(1).split("/") if scope else []
        stage = next((part for part in parts if part in STAGES), "other")
        is_product = one.opcode == "dot" or "ynn" in one.name or "dot" in one.name
        found[one.name] = Operation(stage, "matrix product" if is_product else "other loop")
    return found


def bandwidth() -> float:
    """Bytes per second at which this machine reads a large array, the best of a few."""
    array = jnp.ones(2**26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best_s = 1e9
    for _ in range(5):
        started_s = time.perf_counter()
        total(array).block_until_ready()
        best_s = min(best_s, time.perf_counter() - started_s)
    return array.nbytes / best_s


def traced_ms(run: Callable[[], object], known: dict[str, Operation], steps: int) -> dict[Operation, float]:
    """Milliseconds per decode step of all known operations while `run` takes so many steps.

    Other programs (steps with prompts) may use the same names a few times: an operation counts with its
    median, as often as it ran per step.
    """
    times_ms: dict[str, list[float]] = {}
    for event in traced_events(run):
        if event.name in known:
            times_ms.setdefault(event.name, []).append(event.duration_ns / 1e6)
    sums: defaultdict[Operation, float] = defaultdict(float)
    for name, each_ms in times_ms.items():
        if len(each_ms) > steps // 2:
            sums[known[name]] += statistics.median(each_ms) * len(each_ms) / steps
    return sums


def profile(llm: LLM, rows: int, options: Namespace) -> dict[str, list[float]]:
    """Samples of milliseconds per decode step, by stage and kind, and of the whole step."""
    draw = random.Random(rows)
    known = operations(llm.engine.executor.compiled(Bucket(rows, rows)).as_text() or "")

    def prompts() -> list[list[int]]:
        return [[draw.randrange(3, 32000) for _ in range(options.input_len)] for _ in range(rows)]

    def run(tokens: int) -> float:
        started_s = time.perf_counter()
        llm.generate(prompts(), SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - started_s

    samples: dict[str, list[float]] = {}
    steps = options.output_len - 1
    run(2)
    for _ in range(options.repeats):
        step_ms = (run(options.output_len) - run(1)) / steps * 1e3
        sums = traced_ms(partial(run, options.output_len), known, steps)
        samples.setdefault("step", []).append(step_ms)
        for operation, ms in sums.items():
            samples.setdefault(f"{operation.stage}: {operation.kind}", []).append(ms)
    return samples


def floors_ms(llm: LLM, rows: int, options: Namespace) -> dict[str, float]:
    """Milliseconds to read the weights once, and the cached tokens of all rows once, at full bandwidth."""
    memory = llm.engine.memory
    tokens = rows * (options.input_len + options.output_len / 2)
    kv_bytes = tokens * memory.page_bytes / llm.engine.config.cache.page_size
    rate = bandwidth()
    return {
        "floor: weights": memory.weight_bytes / rate * 1e3,
        "floor: keys and values": kv_bytes / rate * 1e3,
    }


def measure(rows: int, options: Namespace) -> list[Series]:
    with LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.input_len + options.output_len,
        max_rows=rows,
        max_step_tokens=512,
    ) as llm:
        samples = profile(llm, rows, options)
        samples |= {name: [ms] for name, ms in floors_ms(llm, rows, options).items()}
    step_ms = statistics.median(samples["step"])
    print(f"{options.dtype}, {rows} rows: {step_ms:.1f} ms a decode step")
    for name, each_ms in sorted(samples.items(), key=lambda item: -statistics.median(item[1])):
        print(f"  {name:32} {statistics.median(each_ms):8.2f} ms")
    case = f"{options.dtype} {rows} rows"
    return [
        series
        for name, each in samples.items()
        for series in series_by_metric(name, case, {("time per step", "ms"): each})
    ]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    recording = Recording.begin(parser)
    options = recording.options
    series = [one for rows in options.rows for one in measure(rows, options)]
    note = "Operations are traced, which slows the step; `step` is measured without a trace."
    name = Path(options.model).name
    recording.write(f"profile-{options.dtype}", series, note=note, settings={"model": name})


if __name__ == "__main__":
    main()
