"""Generates with our engine: random weights of a shape, answers of many lengths.

It is asked as the workers of other engines are, and prepares the engine that the other parts of the GPU check
measure, so that it finds their programs in the persistent cache.
"""

from protocol import Channel, installed, random_model_arguments

CHANNEL = Channel()  # before JAX is imported, so that nothing else writes where answers go

import json  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402

from albireo_jax.core.config import Dtype  # noqa: E402
from albireo_jax.core.hf_config import model_config_from_hf  # noqa: E402
from albireo_jax.core.types import Request  # noqa: E402
from albireo_jax.launch import prepare_random  # noqa: E402
from albireo_jax.sweep.sweep_settings import Variant  # noqa: E402
from albireo_jax.sweep.variant_engines import VariantEngines  # noqa: E402
from benchmarks.gpu_check.check import Sizes  # noqa: E402
from benchmarks.gpu_check.check_engines import carried_form  # noqa: E402
from benchmarks.gpu_check.trace_part import trace_buckets  # noqa: E402


def requests_of(question: dict) -> list[Request]:
    """All at once, greedy; without stop ids none ends before its length."""
    return [
        Request(request_id=str(index), prompt_token_ids=tuple(prompt), max_tokens=length)
        for index, (prompt, length) in enumerate(
            zip(question["prompts"], question["max_tokens"], strict=True)
        )
    ]


def main() -> None:
    parser = random_model_arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="the engine of a small check")
    parser.add_argument("--carried", type=Path, required=True, help="folder of what an earlier run handed on")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda,cpu")
    sizes = Sizes.of(small=options.small)
    shape = model_config_from_hf(json.loads(options.config.read_text()))
    config = replace(sizes.config(), dtype=Dtype(options.dtype), gpu=carried_form(options.carried, None))
    ready = prepare_random(config, shape, buckets=trace_buckets(sizes))
    engines = VariantEngines((Variant.OVERLAPPED,), lambda _: ready, tp=1)

    def answer(question: dict) -> dict:
        run = engines.run(Variant.OVERLAPPED, requests_of(question))
        return {"seconds": run.seconds, "tokens": run.num_tokens}

    CHANNEL.serve({"versions": installed("albireo-jax", "jax", "jaxlib")}, answer)


if __name__ == "__main__":
    main()
