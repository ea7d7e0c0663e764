"""How long one step's rows take to sample on this CPU, against one pass over their logits, recorded.

Rows are as peaked as a small chat model's: at temperature 0.8, the nucleus of 0.9 holds 20 tokens in the
median and 300 in one row of ten. Logits are made inside the program, as a model makes them, and the time of
making them is taken off. Processor time is recorded beside the wall clock's: other work disturbs it less.

    python benchmarks/sampling_times.py --rows 32 128 --vocab 32000 49152 151936
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.sampling.draw import SamplerParams
from albireo_jax.sampling.sample import sample

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("wall", "processor")


class Case(NamedTuple):
    """A kind of row; a batch mixes the kinds it is given."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY, TEMPERATURE = Case(0.0), Case(0.8)
TOP_K, TOP_P, MIN_P = Case(0.8, top_k=50), Case(0.8, top_p=0.9), Case(0.8, min_p=0.05)
BATCHES = {
    "greedy": [GREEDY],
    "temperature": [TEMPERATURE],
    "top-k 50": [TOP_K],
    "top-p 0.9": [TOP_P],
    "min-p 0.05": [MIN_P],
    "mixed": [GREEDY, TEMPERATURE, TOP_K, TOP_P],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 49_152, 151_936])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def make_logits(rows: int, vocab: int) -> jax.Array:
    spread_R1 = np.linspace(3, 6, rows, dtype=np.float32)[:, None]
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, vocab), np.float32) * spread_R1)


def make_params(rows: int, cases: list[Case]) -> SamplerParams:
    chosen = [cases[row % len(cases)] for row in range(rows)]
    return SamplerParams(
        temperature_R=jnp.asarray([case.temperature for case in chosen], jnp.float32),
        top_k_R=jnp.asarray([case.top_k for case in chosen], jnp.int32),
        top_p_R=jnp.asarray([case.top_p for case in chosen], jnp.float32),
        min_p_R=jnp.asarray([case.min_p for case in chosen], jnp.float32),
        seed_R2=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1),
        position_R=jnp.full(rows, 100, jnp.int32),
    )


def programs(rows: int, vocab: int) -> dict[str, Callable[[], jax.Array]]:
    """What is timed: making logits, one pass over them, and sampling each batch (its logits made first)."""
    logits_RV, one = make_logits(rows, vocab), jnp.float32(1)
    make = jax.jit(lambda logits_RV, one: lax.optimization_barrier(logits_RV * one)[:, 0])
    one_pass = jax.jit(lambda logits_RV: logits_RV.max(axis=1))
    sampler = jax.jit(lambda logits_RV, one, params: sample(logits_RV * one, params))
    timed: dict[str, Callable[[], jax.Array]] = {
        "make logits": lambda: make(logits_RV, one),
        "one pass": lambda: one_pass(logits_RV),
    }
    for name, cases in BATCHES.items():
        params = make_params(rows, cases)
        timed[name] = lambda params=params: sampler(logits_RV, one, params)
    return timed


def measure(rows: int, vocab: int, repeats: int) -> list[Series]:
    """Series of both clocks for every program, in turns; the first turn compiles and is dropped."""
    timed = programs(rows, vocab)
    samples: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in METRICS} for name in timed}
    for turn in range(repeats + 1):
        for name, program in timed.items():
            started_s, started_cpu_s = time.perf_counter(), time.process_time()
            jax.block_until_ready(program())
            spent_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
            if turn:
                for metric, seconds in zip(METRICS, spent_s, strict=True):
                    samples[name][metric].append(1000 * seconds)
    return [
        Series(subject=name, case=f"{rows} rows of {vocab}", metric=metric, unit="ms", samples=tuple(values))
        for name, by_metric in samples.items()
        for metric, values in by_metric.items()
    ]


def render(series: list[Series]) -> str:
    """Net of making the logits: median wall clock, least processor time, and how many passes that is."""
    by_key = {(one.case, one.subject, one.metric): one.samples for one in series}
    lines: list[str] = []
    for case in dict.fromkeys(one.case for one in series):

        def net(name: str, metric: str, pick: Callable[..., float], case: str = case) -> float:
            made = 0.0 if name == "one pass" else pick(by_key[case, "make logits", metric])
            return pick(by_key[case, name, metric]) - made

        pass_ms = net("one pass", "processor", min)
        lines.append(f"{case:20} {'wall ms':>10} {'processor ms':>14} {'passes':>9}")
        for name in ("one pass", *BATCHES):
            processor_ms = net(name, "processor", min)
            lines.append(
                f"  {name:18} {net(name, 'wall', statistics.median):10.2f} {processor_ms:14.2f} "
                f"{processor_ms / pass_ms:9.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    series = [
        one
        for rows in options.rows
        for vocab in options.vocab
        for one in measure(rows, vocab, options.repeats)
    ]
    print(render(series))
    record = Record(
        name="sampling",
        device=cpu_device(),
        settings={"rows": options.rows, "vocab": options.vocab, "repeats": options.repeats},
        series=series,
        note="Sampling series include making the logits, which has a series of its own.",
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
