"""Generates with transformers, in its own virtual environment.

A folder of weights is asked for one static batch of answers of one length, by `generate`. With --random the
weights are drawn, and answers have many lengths, by continuous batching.
"""

from albireo_jax.measure.worker_channel import WorkerChannel
from benchmarks.peers.workers.worker_options import generated, hello, worker_parser

CHANNEL = WorkerChannel()  # before transformers is imported: its progress bars go to stdout

import argparse  # noqa: E402
import json  # noqa: E402
from functools import partial  # noqa: E402
from time import perf_counter  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402
from transformers.generation import ContinuousBatchingManager  # noqa: E402
from transformers.generation.continuous_batching.utils import WorkloadHints  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_model(options: argparse.Namespace) -> Any:
    """The model on the device, its weights drawn there."""
    shape = json.loads((options.model / "config.json").read_text())
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[options.dtype], attn_implementation="sdpa"
        )
    return model.eval()


def finished(manager: ContinuousBatchingManager, count: int) -> dict[str, list[int]]:
    """Tokens of each request, once all have ended."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            found[result.request_id] = result.generated_tokens
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' generation thread ended")
    return found


def continuous(model: Any, question: dict[str, Any]) -> dict[str, object]:
    """Answers of many lengths."""
    prompts, lengths = question["prompts"], question["max_tokens"]
    greedy = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=-1, pad_token_id=0)
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
        found = finished(manager, len(prompts))
        seconds = perf_counter() - begin
    return generated(seconds, [found[str(index)] for index in range(len(prompts))])


def static(model: Any, question: dict[str, Any]) -> dict[str, object]:
    """Answers of one length to prompts of one length."""
    (max_tokens,) = set(question["max_tokens"])
    greedy = GenerationConfig(
        max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    begin = perf_counter()
    ids = torch.tensor(question["prompts"])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    seconds = perf_counter() - begin
    return generated(seconds, output[:, ids.shape[1] :].tolist())


def main() -> None:
    options = worker_parser(__doc__).parse_args()
    if options.random:
        answer = partial(continuous, random_model(options))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
        answer = partial(static, model.eval())
    CHANNEL.serve({**hello("transformers", "torch"), "threads": torch.get_num_threads()}, answer)


if __name__ == "__main__":
    main()
