"""The sizes that an engine's memory allows: its number of pages, and the length of a sequence."""

from dataclasses import dataclass, replace

from albireo_jax.core.config import Dtype, EngineConfig
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.memory import MemoryPlan, host_pages, plan_memory, rules_bytes
from albireo_jax.core.model_config import ModelConfig

LARGE_DEVICE_BYTES = 80 * 10**9
"""Memory from which a device is large."""

LARGE_STEP_TOKENS = 2048
"""Tokens per step of large devices, unless a caller chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """The sizes that the memory of a device allows."""

    memory: MemoryPlan
    limits: EngineLimits


def engine_sizes(
    config: EngineConfig, model: ModelConfig, *, budget_bytes: int, dtype: Dtype, fills_memory: bool
) -> EngineSizes:
    """Sizes of an engine whose weights, pages and slots take `budget_bytes` of each device at most.

    One that fills its memory, as on GPUs, has all pages that fit; if its weights are stacked, its loops of
    decode steps read a second copy of the layers. Raises CapacityError if the weights leave no room,
    ValueError if pages that were asked for do not fit.
    """
    page_size = config.cache.page_size
    max_model_len = resolve_max_model_len(config, model)
    # On a GPU cached prefixes take all that is left; on a CPU what all rows can fill at once, and one page
    # for each, which has to be free when another starts.
    row_pages = -(-max_model_len // page_size) + 1
    most_pages = None if fills_memory else config.scheduler.max_rows * row_pages
    is_stacked = config.gpu.layer_form is LayerForm.STACKED
    counts_bytes = rules_bytes(model, tp=config.parallel.tp, num_slots=config.scheduler.max_rows + 1)
    memory = plan_memory(
        model,
        tp=config.parallel.tp,
        page_size=page_size,
        dtype=dtype,
        budget_bytes=budget_bytes - counts_bytes,
        kv_dtype=config.cache.kv_dtype,
        max_pages=config.cache.num_pages or most_pages,
        copies_layers=fills_memory and is_stacked and config.scheduler.decode_steps > 1,
    )
    if config.cache.num_pages is not None and memory.num_pages < config.cache.num_pages:
        raise ValueError(
            f"num_pages {config.cache.num_pages} does not fit: beside the weights there is room for "
            f"{memory.num_pages} pages of {memory.page_bytes} bytes"
        )
    if config.max_model_len is None:
        max_model_len = min(max_model_len, memory.num_pages * page_size)
    limits = EngineLimits(
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        num_pages=memory.num_pages,
        page_size=page_size,
        max_logprobs=min(config.max_logprobs, model.vocab_size),
        num_host_pages=host_pages(
            config.cache.host_memory_bytes, tp=config.parallel.tp, page_bytes=memory.page_bytes
        ),
        takes_priority=config.scheduler.scheduling_policy.takes_priority,
    )
    return EngineSizes(memory=memory, limits=limits)


def resolve_step_tokens(config: EngineConfig, *, device_bytes: int) -> EngineConfig:
    """The configuration with the tokens per step that suit devices of so much memory, if it leaves them open.

    A device of 80 GB or more computes prompts in larger parts: it reads weights and cached tokens fewer times
    for each, and its matrix products are as fast as they get. Requests that decode wait for them longer.
    """
    if not config.step_tokens_by_device or device_bytes < LARGE_DEVICE_BYTES:
        return config
    tokens = max(config.scheduler.max_step_tokens, LARGE_STEP_TOKENS)
    return replace(config, scheduler=replace(config.scheduler, max_step_tokens=tokens))


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence to serve, before memory is looked at."""
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ValueError(
            f"max_model_len {config.max_model_len} exceeds the {model.max_position} positions of the model"
        )
    return config.max_model_len
