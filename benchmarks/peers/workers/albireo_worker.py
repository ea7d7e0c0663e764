"""Generates with our engine, asked as the workers of other engines are.

A folder of weights is served by `LLM.generate`, all options but dtype and length limit at their defaults.
With --random it prepares the engine that the other parts of the GPU check measure, so that it finds their
programs in the persistent cache.
"""

from albireo_jax.measure.worker_channel import WorkerChannel
from benchmarks.peers.workers.worker_options import generated, hello, worker_parser

CHANNEL = WorkerChannel()  # before JAX is imported, so that nothing else writes where answers go

import argparse  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from time import perf_counter  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from albireo_jax import LLM, SamplingParams  # noqa: E402
from albireo_jax.core.config import Dtype  # noqa: E402
from albireo_jax.core.hf_config import read_hf_config  # noqa: E402
from albireo_jax.core.types import Request  # noqa: E402
from albireo_jax.launch import prepare_random  # noqa: E402
from albireo_jax.sweep.sweep_settings import Variant  # noqa: E402
from albireo_jax.sweep.variant_engines import VariantEngines  # noqa: E402
from benchmarks.gpu_check.check import Sizes  # noqa: E402
from benchmarks.gpu_check.check_engines import carried_form  # noqa: E402
from benchmarks.gpu_check.trace_part import trace_buckets  # noqa: E402


def loaded(llm: LLM, question: dict[str, Any]) -> dict[str, object]:
    """Answers by the Python API."""
    greedy = [
        SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        for length in question["max_tokens"]
    ]
    begin = perf_counter()
    generations = llm.generate(question["prompts"], greedy)
    seconds = perf_counter() - begin
    return generated(seconds, [list(generation.outputs[0].token_ids) for generation in generations])


def random_engine(options: argparse.Namespace) -> VariantEngines:
    """The overlapped engine of the GPU check."""
    sizes = Sizes.of(small=options.small)
    config = replace(sizes.config(), dtype=Dtype(options.dtype), gpu=carried_form(options.carried, None))
    ready = prepare_random(config, read_hf_config(options.model), buckets=trace_buckets(sizes))
    return VariantEngines((Variant.OVERLAPPED,), lambda _: ready, tp=1)


def drawn(engines: VariantEngines, question: dict[str, Any]) -> dict[str, object]:
    """Counts of the tokens of random weights; without stop ids no request ends before its length."""
    requests = [
        Request(request_id=str(index), prompt_token_ids=np.array(prompt, np.int32), max_tokens=length)
        for index, (prompt, length) in enumerate(
            zip(question["prompts"], question["max_tokens"], strict=True)
        )
    ]
    run = engines.run(Variant.OVERLAPPED, requests)
    return {"seconds": run.seconds, "tokens": run.num_tokens}


def main() -> None:
    parser = worker_parser(__doc__)
    parser.add_argument("--small", action="store_true", help="with --random, the engine of a small check")
    parser.add_argument("--carried", type=Path, help="with --random, the folder of an earlier check")
    options = parser.parse_args()
    packages = hello("albireo-jax", "jax", "jaxlib")
    if options.random:
        jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda,cpu")
        CHANNEL.serve(packages, partial(drawn, random_engine(options)))
        return
    with LLM(str(options.model), dtype=options.dtype, max_model_len=options.max_model_len) as llm:
        CHANNEL.serve(packages, partial(loaded, llm))


if __name__ == "__main__":
    main()
