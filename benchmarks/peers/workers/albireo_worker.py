"""Generates with our `LLM.generate`, all options but dtype and length limit at their defaults."""

from protocol import Channel, generation_arguments, installed

CHANNEL = Channel()  # before JAX is imported, so that nothing else writes where answers go

from time import perf_counter  # noqa: E402

from albireo_jax import LLM, SamplingParams  # noqa: E402


def main() -> None:
    options = generation_arguments()
    with LLM(options.model, dtype=options.dtype, max_model_len=options.max_model_len) as llm:

        def answer(question: dict) -> dict:
            greedy = SamplingParams(max_tokens=question["max_tokens"], temperature=0.0, ignore_eos=True)
            begin = perf_counter()
            generations = llm.generate(question["prompts"], greedy)
            seconds = perf_counter() - begin
            return {
                "seconds": seconds,
                "token_ids": [list(generation.outputs[0].token_ids) for generation in generations],
            }

        CHANNEL.serve({"versions": installed("albireo-jax", "jax", "jaxlib")}, answer)


if __name__ == "__main__":
    main()
