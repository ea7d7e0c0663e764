"""Generates with transformers' continuous batching: random weights of a shape, answers of many lengths.

The model is made from a configuration, so that no weights are read. A question has `prompts` and, for each,
its `max_tokens`; all are handed over at once and none ends before its length.
"""

from protocol import Channel, installed, random_model_arguments

CHANNEL = Channel()  # before transformers is imported: its progress bars go to stdout

import argparse  # noqa: E402
import json  # noqa: E402
from time import perf_counter  # noqa: E402

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.generation import ContinuousBatchingManager  # noqa: E402
from transformers.generation.continuous_batching.utils import WorkloadHints  # noqa: E402


def random_model(options: argparse.Namespace) -> torch.nn.Module:
    """The model on the device, its weights drawn there."""
    shape = json.loads(options.config.read_text())
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        )
    return model.eval()


def finished(manager: ContinuousBatchingManager, count: int) -> dict[str, int]:
    """Tokens of each request, once all have ended."""
    counts: dict[str, int] = {}
    while len(counts) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            counts[result.request_id] = len(result.generated_tokens)
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' generation thread ended")
    return counts


def main() -> None:
    options = random_model_arguments(__doc__).parse_args()
    model = random_model(options)

    def answer(question: dict) -> dict:
        prompts, lengths = question["prompts"], question["max_tokens"]
        greedy = GenerationConfig(
            max_new_tokens=max(lengths), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        hints = WorkloadHints(  # as `generate_batch` gives them, which knows one length for all
            max_prompt_length=max(map(len, prompts)),
            max_generated_length=max(lengths),
            num_requests=len(prompts),
        )
        with model.continuous_batching_context_manager(
            generation_config=greedy, workload_hints=hints, timeout=5
        ) as manager:
            begin = perf_counter()
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            counts = finished(manager, len(prompts))
            seconds = perf_counter() - begin
        return {"seconds": seconds, "tokens": sum(counts.values())}

    CHANNEL.serve({"versions": installed("transformers", "torch")}, answer)


if __name__ == "__main__":
    main()
