"""A device's time for a step: the roofline of its arithmetic and memory, or a fitted line."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.config import Dtype, KvDtype
from albireo_jax.core.memory import count_weights, page_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.lanes import Cost

_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device's peak rates, and the latency of one collective between devices.

    `link_bytes_per_s` is what a device sends to the others; it receives as much at the same time.
    """

    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    collective_s: float = 0.0


H100_SXM = DeviceSpec(flops_per_s=989e12, bytes_per_s=3.35e12, link_bytes_per_s=450e9)
"""Data sheet of the H100 SXM: dense bfloat16, HBM3, NVLink 4; the latency of a collective is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """A step's work on one rank: arithmetic, bytes through its memory, and bytes sent to the other ranks."""

    flops: float
    memory_bytes: float
    link_bytes: float
    collectives: int


class RankWork:
    """The work of one of `tp` ranks for any step: weights read once, each row's keys and values read once.

    Counts the multiplications of weights and attention, not norms and activations, which are read and
    written within fused kernels.
    """

    def __init__(
        self, model: ModelConfig, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
    ) -> None:
        self._tp = tp
        self._window = model.sliding_window or model.max_position
        self._vocab = model.padded_vocab_size(tp) // tp
        self._head = self._vocab * model.hidden_size
        # Of an embedding that is not the head as well, only rows are read.
        embedding_bytes = 0 if model.tie_word_embeddings else self._head * dtype.num_bytes
        self._read_bytes = weight_bytes(model, tp=tp, dtype=dtype) - embedding_bytes
        count = count_weights(model, tp=tp)
        self._layers = count.matrices + count.rest
        self._pair_flops = 4 * model.num_layers * (model.num_heads // tp) * model.head_dim
        self._token_bytes = page_bytes(model, tp=tp, page_size=1, dtype=dtype, kv_dtype=kv_dtype)
        self._all_reduced_bytes = 2 * model.num_layers * model.hidden_size * dtype.num_bytes  # per token
        self._collectives = 0 if tp == 1 else 2 * model.num_layers + 2

    def of(self, plan: StepPlan) -> StepWork:
        """The work of a step; one without tokens, which only copies pages, has none."""
        if not plan.num_tokens:
            return StepWork(flops=0, memory_bytes=0, link_bytes=0, collectives=0)
        tp, tokens, sampled = self._tp, plan.num_tokens, int(plan.samples.sum())
        starts, ends = plan.starts.astype(np.int64), (plan.starts + plan.counts).astype(np.int64)
        seen = int((_seen_before(ends, self._window) - _seen_before(starts, self._window)).sum())
        cached = int(np.minimum(ends, self._window + plan.counts - 1).sum())
        logit_bytes = 2 * _LOGIT_BYTES * sampled * self._vocab
        wire_bytes = 2 * self._all_reduced_bytes * tokens + _LOGIT_BYTES * sampled * self._vocab
        return StepWork(
            flops=2 * (self._layers * tokens + self._head * sampled) + self._pair_flops * seen,
            memory_bytes=self._read_bytes + self._token_bytes * (cached + tokens) + logit_bytes,
            link_bytes=(tp - 1) / tp * wire_bytes,
            collectives=self._collectives,
        )


def step_work(
    plan: StepPlan, model: ModelConfig, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> StepWork:
    """The work of one of `tp` ranks for a step, as `RankWork` counts it."""
    return RankWork(model, tp=tp, dtype=dtype, kv_dtype=kv_dtype).of(plan)


def rank_cost(
    model: ModelConfig, device: DeviceSpec, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> Cost:
    """The least seconds for a rank's own part of a step: arithmetic or memory, whichever is slower."""
    rank = RankWork(model, tp=tp, dtype=dtype, kv_dtype=kv_dtype)

    def cost(plan: StepPlan) -> float:
        work = rank.of(plan)
        return max(work.flops / device.flops_per_s, work.memory_bytes / device.bytes_per_s)

    return cost


def roofline_cost(
    model: ModelConfig, device: DeviceSpec, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> Cost:
    """The least seconds for a step: that of each rank, and then the collectives."""
    rank = RankWork(model, tp=tp, dtype=dtype, kv_dtype=kv_dtype)

    def cost(plan: StepPlan) -> float:
        work = rank.of(plan)
        local_s = max(work.flops / device.flops_per_s, work.memory_bytes / device.bytes_per_s)
        return local_s + work.link_bytes / device.link_bytes_per_s + work.collectives * device.collective_s

    return cost


def linear_cost(*, step_s: float, token_s: float, context_token_s: float = 0.0) -> Cost:
    """Seconds per step, per computed token, and per cached token that a row of the step reads."""

    def cost(plan: StepPlan) -> float:
        context = int(plan.starts.sum() + plan.counts.sum())
        return step_s + token_s * plan.num_tokens + context_token_s * context

    return cost


def _seen_before(position: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Cached tokens that the tokens before `position` see, each itself and at most `window` in all."""
    within = np.minimum(position, window)
    return within * (within + 1) // 2 + (position - within) * window
