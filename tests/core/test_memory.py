"""Memory arithmetic against shapes counted by hand."""

from dataclasses import replace

import pytest

from albireo_jax.core.config import Dtype, KvDtype, Quantization
from albireo_jax.core.errors import CapacityError
from albireo_jax.core.memory import (
    MemoryPlan,
    count_weights,
    host_pages,
    kept_bytes,
    layer_bytes,
    page_bytes,
    plan_memory,
    pool_share,
    weight_bytes,
)
from tests.labs.llama_8b import LLAMA_8B


def test_llama_8b_has_its_published_parameter_count() -> None:
    assert weight_bytes(LLAMA_8B, tp=1, dtype=Dtype.BFLOAT16) == 2 * 8_030_261_248


@pytest.mark.parametrize("tp", [1, 8])
def test_quantised_matrices_take_a_byte_per_number_and_four_per_output_channel(tp: int) -> None:
    numbers = 32 * 4096 * (32 * 128 + 2 * 8 * 128 + 32 * 128 + 3 * 14336) // tp
    split_channels, whole_channels = 32 * (48 * 128 + 2 * 14336) // tp, 32 * (4096 + 4096)
    floats = (2 * 128256 // tp + 2 * 32 + 1) * 4096
    for kind in Quantization:
        model = replace(LLAMA_8B, quantization=kind)
        wanted = numbers + 4 * (split_channels + whole_channels) + 2 * floats
        assert weight_bytes(model, tp=tp, dtype=Dtype.BFLOAT16) == wanted
        assert count_weights(model, tp=tp) == count_weights(LLAMA_8B, tp=tp)


def test_a_page_of_llama_8b_holds_16_tokens_of_8_heads() -> None:
    assert page_bytes(LLAMA_8B, tp=1, page_size=16, dtype=Dtype.BFLOAT16) == 2 * 32 * 16 * 8 * 128 * 2
    assert page_bytes(LLAMA_8B, tp=8, page_size=16, dtype=Dtype.BFLOAT16) == 2 * 32 * 16 * 1 * 128 * 2


def test_a_quantised_page_has_a_byte_per_number_and_two_per_scale() -> None:
    page = {
        kv_dtype: page_bytes(LLAMA_8B, tp=2, page_size=16, dtype=Dtype.BFLOAT16, kv_dtype=kv_dtype)
        for kv_dtype in KvDtype
    }
    vectors = 2 * 32 * 16 * 4
    assert page == {
        KvDtype.AUTO: vectors * 128 * 2,
        KvDtype.BFLOAT16: vectors * 128 * 2,
        KvDtype.FLOAT32: vectors * 128 * 4,
        KvDtype.INT8: vectors * (128 + 2),
        KvDtype.FP8: vectors * (128 + 2),
    }


def test_pages_of_half_the_bytes_are_nearly_twice_as_many() -> None:
    auto, int8 = (
        plan_memory(
            LLAMA_8B, tp=1, page_size=16, dtype=Dtype.BFLOAT16, kv_dtype=kv_dtype, budget_bytes=72 * 10**9
        )
        for kv_dtype in (KvDtype.AUTO, KvDtype.INT8)
    )
    assert int8.weight_bytes == auto.weight_bytes
    assert int8.num_pages / auto.num_pages == pytest.approx(256 / 130, rel=1e-3)


def test_pages_fill_what_the_weights_leave() -> None:
    plan = plan_memory(LLAMA_8B, tp=1, page_size=16, dtype=Dtype.BFLOAT16, budget_bytes=72 * 10**9)
    used = plan.weight_bytes + (plan.num_pages + 1) * plan.page_bytes
    assert used <= 72 * 10**9 < used + plan.page_bytes


def test_weights_that_leave_no_page_are_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match="16060522496 bytes"):
        plan_memory(LLAMA_8B, tp=1, page_size=16, dtype=Dtype.BFLOAT16, budget_bytes=16 * 10**9)


def test_a_layer_of_llama_8b_has_218_million_numbers() -> None:
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336 + 2)
    assert layer_bytes(LLAMA_8B, tp=1, dtype=Dtype.BFLOAT16) == 2 * 32 * layer == 2 * 32 * 218_112_000


@pytest.mark.parametrize("quantization", [None, *Quantization])
@pytest.mark.parametrize("tp", [1, 8])
def test_a_second_copy_of_the_layers_takes_its_bytes_from_the_pages(
    tp: int, quantization: Quantization | None
) -> None:
    model = replace(LLAMA_8B, quantization=quantization)

    def plan(budget_bytes: int, *, copies_layers: bool) -> MemoryPlan:
        return plan_memory(
            model,
            tp=tp,
            page_size=16,
            dtype=Dtype.BFLOAT16,
            budget_bytes=budget_bytes,
            copies_layers=copies_layers,
        )

    copy = layer_bytes(model, tp=tp, dtype=Dtype.BFLOAT16)
    twice = plan(72 * 10**9, copies_layers=True)
    assert twice == replace(plan(72 * 10**9 - copy, copies_layers=False), copy_bytes=copy)
    once = plan(72 * 10**9, copies_layers=False)
    assert (once.num_pages - twice.num_pages) * once.page_bytes == pytest.approx(copy, abs=once.page_bytes)


def test_a_second_copy_that_leaves_no_page_is_refused_with_its_flag() -> None:
    with pytest.raises(CapacityError, match=r"16060522496 bytes, .*--decode-steps above 1 13959168000 and"):
        plan_memory(
            LLAMA_8B,
            tp=1,
            page_size=16,
            dtype=Dtype.BFLOAT16,
            budget_bytes=24 * 10**9,
            copies_layers=True,
        )


@pytest.mark.parametrize("share", [0.5, 0.9, 0.97])
def test_what_stays_is_the_share_of_the_device_whose_pool_was_taken_for_it(share: float) -> None:
    device_bytes = 85 * 10**9
    assert kept_bytes(int(device_bytes * pool_share(share)), memory_share=share) == pytest.approx(
        device_bytes * share, rel=1e-9
    )
    assert share < pool_share(share) < 1
    assert kept_bytes(device_bytes // 2, memory_share=share) < device_bytes // 2


def test_a_host_page_takes_the_bytes_of_all_ranks() -> None:
    page = page_bytes(LLAMA_8B, tp=8, page_size=16, dtype=Dtype.BFLOAT16)
    assert host_pages(0, tp=8, page_bytes=page) == 0
    assert host_pages(8 * page, tp=8, page_bytes=page) == 1
    assert host_pages(24 * page - 1, tp=8, page_bytes=page) == 2


def test_host_memory_for_less_than_a_page_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match="host_memory_bytes 79 holds no KV page, which takes 80 bytes"):
        host_pages(79, tp=8, page_bytes=10)
