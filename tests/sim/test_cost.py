import dataclasses

import numpy as np
import pytest

from albireo_jax.core.config import Dtype, KvDtype, Quantization
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.cost import H100_SXM, linear_cost, roofline_cost, step_work

LLAMA_7B = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def plan(*rows: tuple[int, int]) -> StepPlan:
    """Rows of (start, count), all of which sample."""
    starts, counts = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    none = np.zeros(0, np.int32)
    return StepPlan(
        step=0,
        request_ids=tuple(map(str, range(len(rows)))),
        epochs=starts * 0,
        slots=np.arange(len(rows), dtype=np.int32),
        starts=starts,
        counts=counts,
        samples=counts > 0,
        token_ids=np.zeros(counts.sum(), np.int32),
        update_slots=none,
        update_columns=none,
        update_pages=none,
    )


def test_flops_of_a_prompt_are_two_per_weight_and_token_and_four_per_pair_of_tokens() -> None:
    work = step_work(plan((0, 100)), LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16)
    head = 32000 * 4096
    weights = weight_bytes(LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16) // 2 - 2 * head
    pairs = 100 * 101 // 2
    assert work.flops == 2 * weights * 100 + 2 * head + 4 * 32 * 32 * 128 * pairs


def test_a_chunked_prompt_takes_the_same_attention_as_a_whole_one() -> None:
    model = dataclasses.replace(LLAMA_7B, sliding_window=30)
    for config in (LLAMA_7B, model):
        whole = step_work(plan((0, 100)), config, tp=1, dtype=Dtype.BFLOAT16).flops
        chunks = [
            step_work(plan(row), config, tp=1, dtype=Dtype.BFLOAT16).flops
            for row in ((0, 20), (20, 45), (65, 35))
        ]
        sampled_twice = 2 * 2 * 32000 * 4096
        assert sum(chunks) - sampled_twice == whole


def test_a_window_bounds_what_is_seen_and_read() -> None:
    window = dataclasses.replace(LLAMA_7B, sliding_window=8)
    one, long = plan((7, 1)), plan((4000, 1))
    assert step_work(one, window, tp=1, dtype=Dtype.FLOAT32) == step_work(
        long, window, tp=1, dtype=Dtype.FLOAT32
    )
    assert (
        step_work(long, window, tp=1, dtype=Dtype.FLOAT32).flops
        < step_work(long, LLAMA_7B, tp=1, dtype=Dtype.FLOAT32).flops
    )


def test_a_decode_step_reads_all_weights_but_the_embedding_and_the_cached_tokens() -> None:
    work = step_work(plan((999, 1), (499, 1)), LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16)
    token = page_bytes(LLAMA_7B, tp=1, page_size=1, dtype=Dtype.BFLOAT16)
    weights = weight_bytes(LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16) - 32000 * 4096 * 2
    logits = 2 * 4 * 2 * 32000
    assert work.memory_bytes == weights + token * (1500 + 2) + logits
    tied = dataclasses.replace(LLAMA_7B, tie_word_embeddings=True)
    assert step_work(plan((999, 1), (499, 1)), tied, tp=1, dtype=Dtype.BFLOAT16) == work


def test_quantised_keys_and_values_are_read_in_fewer_bytes() -> None:
    step = plan((999, 1), (499, 1))
    whole, half = (
        step_work(step, LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16, kv_dtype=kv_dtype)
        for kv_dtype in (KvDtype.AUTO, KvDtype.INT8)
    )
    assert whole.memory_bytes - half.memory_bytes == 1502 * 2 * 32 * 32 * (2 * 128 - 130)
    assert dataclasses.replace(half, memory_bytes=whole.memory_bytes) == whole


def test_a_step_that_only_copies_has_no_work() -> None:
    step = dataclasses.replace(plan((0, 1)), token_ids=np.zeros(0, np.int32), samples=np.zeros(0, np.bool_))
    assert roofline_cost(LLAMA_7B, H100_SXM, tp=4, dtype=Dtype.BFLOAT16)(step) == 0


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_share_the_work_and_send_to_each_other(tp: int) -> None:
    step = plan(*[(500, 1)] * 64)
    alone = step_work(step, LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16)
    shared = step_work(step, LLAMA_7B, tp=tp, dtype=Dtype.BFLOAT16)
    assert shared.flops == pytest.approx(alone.flops / tp, rel=0.01)
    assert shared.memory_bytes == pytest.approx(alone.memory_bytes / tp, rel=0.01)
    assert (alone.link_bytes, alone.collectives) == (0, 0)
    assert shared.collectives == 66
    assert shared.link_bytes > 2 * 32 * 64 * 4096 * 2


def test_decode_is_bound_by_memory_and_prefill_by_arithmetic() -> None:
    cost = roofline_cost(LLAMA_7B, H100_SXM, tp=1, dtype=Dtype.BFLOAT16)
    decode, prefill = plan((500, 1)), plan((0, 4096))
    memory_s = step_work(decode, LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16).memory_bytes / 3.35e12
    flops_s = step_work(prefill, LLAMA_7B, tp=1, dtype=Dtype.BFLOAT16).flops / 989e12
    assert (cost(decode), cost(prefill)) == (memory_s, flops_s)
    assert 3e-3 < cost(decode) < 5e-3  # 13 GB at 3.35 TB/s


def test_the_latency_of_collectives_adds_up() -> None:
    slow = dataclasses.replace(H100_SXM, collective_s=1e-5)
    step = plan((500, 1))
    fast_s, slow_s = (
        roofline_cost(LLAMA_7B, device, tp=4, dtype=Dtype.BFLOAT16)(step) for device in (H100_SXM, slow)
    )
    assert slow_s - fast_s == pytest.approx(66e-5)


def test_linear_cost_counts_steps_tokens_and_context() -> None:
    cost = linear_cost(step_s=1.0, token_s=0.1, context_token_s=0.001)
    assert cost(plan((10, 1), (0, 5))) == pytest.approx(1 + 0.6 + 0.016)


def test_quantised_matrices_are_read_in_half_the_bytes_and_multiplied_as_often() -> None:
    quantised = dataclasses.replace(LLAMA_7B, quantization=Quantization.FP8)
    work, exact = (
        step_work(plan((9, 1)), model, tp=2, dtype=Dtype.BFLOAT16) for model in (quantised, LLAMA_7B)
    )
    matrices, channels = 32 * (4 * 4096 + 3 * 11008) * 4096 // 2, 32 * (3 * 4096 + 2 * 11008) // 2 + 32 * 8192
    assert exact.memory_bytes - work.memory_bytes == matrices - 4 * channels
    assert dataclasses.replace(work, memory_bytes=exact.memory_bytes) == exact
