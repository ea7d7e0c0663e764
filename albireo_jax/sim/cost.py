"""How long a device takes for a step: the roofline of its arithmetic and memory, or a fitted line."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.config import Dtype, KvDtype, ModelConfig
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.executor import Cost

_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What one device can do at most, and the latency of one collective between devices.

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
    """What one rank computes, moves through its memory, and sends to the others in a step."""

    flops: float
    memory_bytes: float
    link_bytes: float
    collectives: int


def step_work(
    plan: StepPlan, model: ModelConfig, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> StepWork:
    """The work of one of `tp` ranks: weights read once, keys and values of each row's context read once.

    Counts the multiplications of weights and attention, not norms and activations, which are read and
    written within fused kernels. A step without tokens, which only copies pages, has no work.
    """
    if not plan.num_tokens:
        return StepWork(flops=0, memory_bytes=0, link_bytes=0, collectives=0)
    tokens, sampled = plan.num_tokens, int(plan.samples.sum())
    vocab = model.padded_vocab_size(tp) // tp
    head = vocab * model.hidden_size
    embedding_bytes = 0 if model.tie_word_embeddings else head * dtype.num_bytes  # only rows of it are read
    read_bytes = weight_bytes(model, tp=tp, dtype=dtype) - embedding_bytes
    layers = read_bytes // dtype.num_bytes - head

    window = model.sliding_window or model.max_position
    starts, counts = plan.starts.astype(np.int64), plan.counts.astype(np.int64)
    seen = int((_seen_before(starts + counts, window) - _seen_before(starts, window)).sum())
    cached = int(np.minimum(starts + counts, window + counts - 1).sum())
    attention = 4 * model.num_layers * (model.num_heads // tp) * model.head_dim * seen
    token_bytes = page_bytes(model, tp=tp, page_size=1, dtype=dtype, kv_dtype=kv_dtype)
    logit_bytes = 2 * _LOGIT_BYTES * sampled * vocab
    all_reduced = 2 * model.num_layers * tokens * model.hidden_size * dtype.num_bytes
    return StepWork(
        flops=2 * (layers * tokens + head * sampled) + attention,
        memory_bytes=read_bytes + token_bytes * (cached + tokens) + logit_bytes,
        link_bytes=2 * (tp - 1) / tp * all_reduced + (tp - 1) / tp * _LOGIT_BYTES * sampled * vocab,
        collectives=0 if tp == 1 else 2 * model.num_layers + 2,
    )


def roofline_cost(
    model: ModelConfig, device: DeviceSpec, *, tp: int, dtype: Dtype, kv_dtype: KvDtype = KvDtype.AUTO
) -> Cost:
    """The least seconds for a step: arithmetic or memory, whichever is slower, and then the collectives."""

    def cost(plan: StepPlan) -> float:
        work = step_work(plan, model, tp=tp, dtype=dtype, kv_dtype=kv_dtype)
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
