"""The swap experiment: its conversations go on where they ended, and its engines rank as memory says."""

import pytest

from albireo_jax.core.config import Dtype, SchedulerConfig
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.sim.cost import H100_SXM, roofline_cost
from benchmarks.swap import Memory, Pages, SimulatedDevice, Talks, simulate

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=1000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
TALKS = Talks(count=12, turns=3, said=300, answered=20, vocab_size=1000)


def test_each_turn_goes_on_where_the_last_one_ended() -> None:
    seen: list[list[tuple[int, ...]]] = []

    def answer(texts, max_tokens):
        seen.append(texts)
        return [(len(seen),) * max_tokens for _ in texts]

    assert TALKS.hold(answer) == 12 * 3 * 20
    for turn, texts in enumerate(seen):
        assert {len(text) for text in texts} == {320 * turn + 300}
        assert all(
            text[: len(seen[turn - 1][0]) + 20] == seen[turn - 1][place] + (turn,) * 20
            for place, text in enumerate(texts)
            if turn
        )
    assert TALKS.demand == 12 * 60
    assert len({text[:8] for text in seen[0]}) == 12


@pytest.fixture(scope="module")
def runs():
    device = SimulatedDevice.over_bus(
        MODEL,
        roofline_cost(MODEL, H100_SXM, tp=1, dtype=Dtype.BFLOAT16),
        dtype=Dtype.BFLOAT16,
        bus_bytes_per_s=25e9,
    )
    config = SchedulerConfig(max_rows=8, max_step_tokens=128)
    return {
        memory: simulate(device, TALKS, Pages.of(memory, demand=TALKS.demand), config=config)
        for memory in Memory
    }


def test_only_those_with_memory_find_what_they_computed(runs) -> None:
    found = {memory: run.stats.cache.cached_tokens for memory, run in runs.items()}
    ideal = 12 * (320 // 16 * 16 + 640 // 16 * 16 - 2 * 16)
    assert ideal <= found[Memory.ENDLESS] <= 12 * 960
    assert found[Memory.SWAP] > 0.6 * ideal
    assert found[Memory.RECOMPUTE] < 0.3 * ideal
    assert {run.num_tokens for run in runs.values()} == {720}


def test_copies_are_hidden_and_swapping_pays(runs) -> None:
    swap = runs[Memory.SWAP]
    copies = swap.table.copies
    assert copies.total_s > 0
    assert copies.exposed_s < 0.1 * copies.total_s
    assert runs[Memory.ENDLESS].table.copies.total_s == runs[Memory.RECOMPUTE].table.copies.total_s == 0
    assert runs[Memory.ENDLESS].seconds < swap.seconds < runs[Memory.RECOMPUTE].seconds
