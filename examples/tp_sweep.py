"""Tokens per second over tensor-parallel degrees, and that the tokens do not depend on the degree.

`albireo sweep` measures this properly: N / t replicas for each degree, variants in turn, and pages of
results. This is its idea in a screen of code. Without GPUs a CPU stands for the devices, and then nothing
becomes faster with t.

    python examples/tp_sweep.py --model /models/Qwen2.5-0.5B-Instruct --tp 1 2 --virtual-devices 2
"""

import argparse
import time
from collections.abc import Sequence

from albireo_jax import LLM, SamplingParams

PROMPTS = ("The capital of France is", "Once upon a time", "The sun", "One day, a cat")


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate the same at each degree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="its attention heads must be multiples of the degrees")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--virtual-devices", type=int, default=0, help="let the CPU stand for so many")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(arguments)

    params = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=options.max_tokens)
    found: dict[int, list[tuple[int, ...]]] = {}
    print(" t   tokens/s   host exposed, ms per step")
    for tp in options.tp:
        with LLM(
            options.model,
            tp=tp,
            virtual_devices=options.virtual_devices,
            max_model_len=256,
            max_rows=4,
            max_step_tokens=32,
            max_logprobs=0,
        ) as llm:
            llm.generate(PROMPTS, params)  # a first run, which is not counted
            began_s = time.perf_counter()
            generations = llm.generate(PROMPTS, params)
            elapsed_s = time.perf_counter() - began_s
            table = llm.task_table()
            found[tp] = [generation.outputs[0].token_ids for generation in generations]
            count = sum(map(len, found[tp]))
            exposed_ms = 1e3 * sum(task.exposed_s for task in table.tasks) / table.steps
            print(f"{tp:>2} {count / elapsed_s:>10.1f} {exposed_ms:>12.3f}")
    same = all(tokens == found[options.tp[0]] for tokens in found.values())
    print("the tokens are the same at every degree" if same else "the tokens differ")


if __name__ == "__main__":
    main()
