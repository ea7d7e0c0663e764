"""Use the served model inside of a JAX program: as a function under `jax.jit`, and as a gradient.

The engine samples quickly, with its cache and its batches. `llm.model` is the same model with the same
weights as an ordinary `flax.nnx` module, so a program can score what the engine wrote, or differentiate
through it.

    python examples/embedding_in_jax.py
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from albireo_jax import LLM, SamplingParams


def log_likelihood(model: nnx.Module, token_ids: jax.Array) -> jax.Array:
    """Mean log probability of each token of a text after the first, given those before it."""
    logits = model(token_ids[:-1])  # [T, V], by dense causal attention
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token_ids[1:, None], axis=-1)
    return chosen.mean()


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample with the engine, score with the module, and differentiate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", default="Once upon a time")
    options = parser.parse_args(arguments)

    with LLM(options.model, max_model_len=256, max_rows=4, max_step_tokens=32, max_logprobs=0) as llm:
        params = SamplingParams(temperature=1, seed=1, max_tokens=16, n=4, ignore_eos=True)
        (generation,) = llm.generate(options.prompt, params)
        texts = [(*generation.prompt_token_ids, *output.token_ids) for output in generation.outputs]

        score = nnx.jit(log_likelihood)
        scores = [float(score(llm.model, jnp.array(text))) for text in texts]
        for output, value in sorted(zip(generation.outputs, scores, strict=True), key=lambda pair: -pair[1]):
            print(f"{value:8.3f}  {output.text!r}")

        best = jnp.array(texts[max(range(len(texts)), key=scores.__getitem__)])
        gradient = nnx.grad(log_likelihood)(llm.model, best)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)))
        print(f"norm of the gradient of the best score: {float(norm):.3f}")


if __name__ == "__main__":
    main()
