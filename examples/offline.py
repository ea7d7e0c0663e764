"""Complete many prompts in one call, and show where the time of the steps went.

python examples/offline.py
python examples/offline.py --model /models/Llama-3.1-8B-Instruct
"""

import argparse
from collections.abc import Sequence

from albireo_jax import LLM, SamplingParams

PROMPTS = ("The capital of France is", "Once upon a time", "The three primary colours are")


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate two samples of each prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args(arguments)

    # The seed makes the samples reproducible, whatever else runs in the same steps.
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, n=2, max_tokens=options.max_tokens)
    with LLM(options.model, max_model_len=256, max_rows=4, max_step_tokens=32, max_logprobs=0) as llm:
        for prompt, generation in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            for output in generation.outputs:
                print(f"{prompt!r} -> {output.text!r} ({output.finish_reason})")
        print()
        print(llm.task_table())


if __name__ == "__main__":
    main()
