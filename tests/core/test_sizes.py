"""Sizes of engines on devices of known memory: what each choice takes from the pages, and what is refused."""

from dataclasses import replace

import pytest

from albireo_jax.core.config import (
    CacheConfig,
    Dtype,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
)
from albireo_jax.core.errors import CapacityError
from albireo_jax.core.gpu_options import GpuConfig, LayerForm
from albireo_jax.core.memory import layer_bytes, page_bytes, rules_bytes, weight_bytes
from albireo_jax.core.sizes import EngineSizes, engine_sizes, resolve_step_tokens
from tests.labs.llama_8b import LLAMA_8B

CONFIG = EngineConfig(model="any")
BUDGET = 72 * 10**9


def sizes(config: EngineConfig, *, budget: int = BUDGET, gpu: bool = True) -> EngineSizes:
    return engine_sizes(config, LLAMA_8B, budget_bytes=budget, dtype=Dtype.BFLOAT16, fills_memory=gpu)


def with_steps(steps: int, *, tp: int = 1, form: LayerForm | None = LayerForm.STACKED) -> EngineConfig:
    return replace(
        CONFIG,
        parallel=ParallelConfig(tp=tp),
        scheduler=SchedulerConfig(decode_steps=steps, max_rows=64),
        gpu=GpuConfig(layer_form=form),
    )


@pytest.mark.parametrize("tp", [1, 4])
def test_weights_slots_and_pages_fill_the_memory_of_a_gpu(tp: int) -> None:
    memory = sizes(with_steps(1, tp=tp)).memory
    used = weight_bytes(LLAMA_8B, tp=tp, dtype=Dtype.BFLOAT16) + rules_bytes(LLAMA_8B, tp=tp, num_slots=65)
    used += (memory.num_pages + 1) * memory.page_bytes
    assert used <= BUDGET < used + memory.page_bytes


@pytest.mark.parametrize("tp", [1, 4])
def test_decode_steps_take_a_copy_of_stacked_layers_from_the_pages_of_a_gpu(tp: int) -> None:
    copy = layer_bytes(LLAMA_8B, tp=tp, dtype=Dtype.BFLOAT16)
    once, twice = sizes(with_steps(1, tp=tp)), sizes(with_steps(8, tp=tp))
    assert twice.memory.copy_bytes == copy
    assert twice.limits.num_pages == sizes(with_steps(1, tp=tp), budget=BUDGET - copy).limits.num_pages
    page = page_bytes(LLAMA_8B, tp=tp, page_size=16, dtype=Dtype.BFLOAT16)
    lost = once.limits.num_pages - twice.limits.num_pages
    assert copy - page < lost * page < copy + page
    if tp == 1:
        assert (once.limits.num_pages, twice.limits.num_pages) == (26657, 20000)


def test_unstacked_layers_are_read_by_decode_steps_as_they_are() -> None:
    for form in (None, LayerForm.UNSTACKED):
        assert sizes(with_steps(8, form=form)) == sizes(with_steps(1))


def test_large_devices_compute_more_tokens_per_step_unless_a_caller_chooses() -> None:
    open_config = replace(CONFIG, step_tokens_by_device=True)

    def tokens(config: EngineConfig, memory: float) -> int:
        return resolve_step_tokens(config, device_bytes=int(memory)).scheduler.max_step_tokens

    assert [tokens(open_config, memory) for memory in (0, 24e9, 79e9, 80e9, 141e9)] == [512] * 3 + [2048] * 2
    assert tokens(CONFIG, 141e9) == 512
    more = replace(open_config, scheduler=SchedulerConfig(max_rows=4096, max_step_tokens=4096))
    assert tokens(more, 141e9) == 4096
    assert resolve_step_tokens(open_config, device_bytes=10**12).gpu == open_config.gpu


def test_a_cpu_has_no_copy_to_count_for_decode_steps() -> None:
    assert sizes(with_steps(8), gpu=False) == sizes(with_steps(1), gpu=False)


def test_what_does_not_fit_for_decode_steps_is_refused_with_their_flag() -> None:
    assert sizes(with_steps(1), budget=24 * 10**9).limits.num_pages > 1000
    with pytest.raises(CapacityError, match="second copy of the layers for --decode-steps above 1"):
        sizes(with_steps(8), budget=24 * 10**9)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_shares_that_leave_nothing_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"memory_share must be above 0 and below 1, got {share}"):
        CacheConfig(memory_share=share)
