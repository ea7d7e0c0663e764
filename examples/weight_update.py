"""Change the weights while the engine serves: sample, take a gradient step, update, sample again.

This is the loop of reinforcement learning in its smallest form. The reward is the share of a letter in an
answer; the policy gradient raises the log probability of answers that have more of it. An update compiles
nothing, and later requests do not find prefixes that the old weights computed.

    python examples/weight_update.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from albireo_jax import LLM, SamplingParams

PROMPT = "Once upon a time"


def reward(text: str, letter: str) -> float:
    """The share of a letter in a text."""
    return text.count(letter) / max(len(text), 1)


def loss(model: nnx.Module, text_BT: jax.Array, advantage_B: jax.Array, prompt_len: int) -> jax.Array:
    """The policy gradient's loss: less advantage for likelier answers is better."""
    logits_BTV = model(text_BT[:, :-1])
    chosen_BT1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), text_BT[:, 1:, None], axis=-1)
    answer_BT = chosen_BT1[:, prompt_len - 1 :, 0]
    return -(advantage_B[:, None] * answer_BT).mean()


def stepped(weights: Any, gradient: Any, *, rate: float) -> Any:
    """The weights after one step of gradient descent."""

    def step(weight: jax.Array, slope: jax.Array) -> jax.Array:
        return weight - rate * slope

    return jax.tree.map(step, weights, gradient)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train for a few rounds and print the mean reward of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--letter", default="e")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.05)
    options = parser.parse_args(arguments)

    with LLM(options.model, max_model_len=256, max_rows=4, max_step_tokens=32, max_logprobs=0) as llm:
        for round_ in range(options.rounds):
            params = SamplingParams(temperature=1, seed=round_, n=16, max_tokens=24, ignore_eos=True)
            (generation,) = llm.generate(PROMPT, params)
            rewards_B = jnp.array([reward(output.text, options.letter) for output in generation.outputs])
            print(f"round {round_}: mean reward {float(rewards_B.mean()):.3f}")

            prompt_ids = generation.prompt_token_ids
            text_BT = jnp.array([(*prompt_ids, *output.token_ids) for output in generation.outputs])
            advantage_B = (rewards_B - rewards_B.mean()) / (rewards_B.std() + 1e-6)
            gradient = nnx.grad(loss)(llm.model, text_BT, advantage_B, len(prompt_ids))
            llm.update_weights(stepped(nnx.state(llm.model, nnx.Param), gradient, rate=options.rate))


if __name__ == "__main__":
    main()
