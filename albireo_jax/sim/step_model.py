"""The time of a step of one replica: a rank's own work, collectives, sampling and the host.

`StepModel.forward` may be a measured table of one rank's shard-shaped model, to which `with_collectives`
adds what a single device cannot measure; or the roofline, with the share of the data sheet's rates that a
good kernel is assumed to reach. Whatever it is, the model says so.

Sampling (T4) is apart, since how much of it each rank does is a choice::

    replicated   all-gather of the logits, R x V; each rank samples R rows
    sharded      all-to-all of the logits, R x V / t; each rank samples R / t rows; all-gather of R ids

Per row the sampler moves its V float32 logits `SAMPLER_PASSES` times: they are written where the exchange put
them, read for the maxima of their blocks (`sampling.sample`, of every row), and read for the mass of the
nucleus (`sampling.filters.mass`, of rows with top-p). What follows looks at a few blocks and is left out, and
so is what greedy rows save: it is the cost of rows with top-p.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from albireo_jax.core.config import Dtype, KvDtype, SamplingMode
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.cost import DeviceSpec, rank_cost
from albireo_jax.sim.gpus import Gpu
from albireo_jax.sim.host import HostTerms
from albireo_jax.sim.lanes import Cost
from albireo_jax.sim.links import Links
from albireo_jax.sim.planning.calibration import Calibration

SAMPLER_PASSES = 3
_LOGIT_BYTES, _ID_BYTES = 4, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Seconds of a step of one replica: forward pass, sampling and host, and where they come from.

    `label` says in a few words what every figure made with it is. `is_extrapolated` says of a step that it
    lies outside of what was measured.
    """

    forward: Cost
    sampling: Cost
    host: HostTerms
    label: str
    sources: tuple[str, ...]
    is_extrapolated: Callable[[StepPlan], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a data sheet's rates that kernels reach: assumed, not measured."""

    flops: float = 0.6
    memory: float = 0.75

    def __post_init__(self) -> None:
        """Refuse shares that no kernel reaches."""
        for name, share in (("flops", self.flops), ("memory", self.memory)):
            if not 0 < share <= 1:
                raise ValueError(f"the {name} efficiency must be above 0 and at most 1, got {share}")

    def of(self, gpu: Gpu) -> DeviceSpec:
        """The rates of a GPU that are reached."""
        return DeviceSpec(
            flops_per_s=self.flops * gpu.flops_per_s,
            bytes_per_s=self.memory * gpu.bytes_per_s,
            link_bytes_per_s=gpu.links.bytes_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTerms:
    """Seconds in which one rank samples a row over the whole vocabulary, and where that comes from."""

    row_s: float
    source: str


VLLM_SAMPLER = SamplerTerms(
    row_s=6e-3 / 128,
    source=(
        "vLLM 0.11.2 as arXiv 2606.01927 measured it: 6 ms for 128 rows of Qwen2.5-32B at t=4; assumed to be "
        "proportional to the rows, on each rank, whatever the vocabulary"
    ),
)
"""The sampler of the engine that Albireo was compared with."""


def sampler_terms(model: ModelConfig, device: DeviceSpec) -> SamplerTerms:
    """Terms of this project's sampler: its passes over the logits at the rate of the device's memory."""
    return SamplerTerms(
        row_s=SAMPLER_PASSES * _LOGIT_BYTES * model.vocab_size / device.bytes_per_s,
        source=f"sampling moves the float32 logits of a row {SAMPLER_PASSES} times through memory",
    )


def sampling_cost(
    terms: SamplerTerms, model: ModelConfig, links: Links, *, tp: int, mode: SamplingMode
) -> Cost:
    """Seconds of exchanging and sampling the logits of a step's rows."""
    row_bytes = _LOGIT_BYTES * model.padded_vocab_size(tp)

    def replicated(plan: StepPlan) -> float:
        rows = int(plan.samples.sum())
        if not rows:
            return 0.0
        return links.all_gather_s(rows * row_bytes, ranks=tp) + rows * terms.row_s

    def sharded(plan: StepPlan) -> float:
        rows = -(-int(plan.samples.sum()) // tp)  # of one rank
        if not rows:
            return 0.0
        exchange_s = links.all_to_all_s(rows * row_bytes, ranks=tp)
        return exchange_s + rows * terms.row_s + links.all_gather_s(rows * tp * _ID_BYTES, ranks=tp)

    return replicated if mode is SamplingMode.REPLICATED or tp == 1 else sharded


def with_collectives(local: Cost, model: ModelConfig, links: Links, *, tp: int, dtype: Dtype) -> Cost:
    """A rank's own seconds and those of all-reduces: two for each layer, and one for the embedding."""
    if tp == 1:
        return local
    count, token_bytes = 2 * model.num_layers + 1, model.hidden_size * dtype.num_bytes

    def cost(plan: StepPlan) -> float:
        if not plan.num_tokens:
            return local(plan)
        return local(plan) + count * links.all_reduce_s(plan.num_tokens * token_bytes, ranks=tp)

    return cost


def roofline_model(
    model: ModelConfig,
    gpu: Gpu,
    *,
    tp: int,
    host: HostTerms,
    mode: SamplingMode,
    dtype: Dtype = Dtype.BFLOAT16,
    kv_dtype: KvDtype = KvDtype.AUTO,
    efficiency: Efficiency | None = None,
    sampler: SamplerTerms | None = None,
) -> StepModel:
    """Steps by the data sheet; nothing of it was measured on a GPU."""
    reached = efficiency or Efficiency()
    device = reached.of(gpu)
    terms = sampler or sampler_terms(model, device)
    local = rank_cost(model, device, tp=tp, dtype=dtype, kv_dtype=kv_dtype)
    return StepModel(
        forward=with_collectives(local, model, gpu.links, tp=tp, dtype=dtype),
        sampling=sampling_cost(terms, model, gpu.links, tp=tp, mode=mode),
        host=host,
        label="simulated (roofline)",
        sources=(
            f"forward pass: roofline of {gpu.title}; that {reached.flops:.0%} of the data sheet's arithmetic "
            f"and {reached.memory:.0%} of its memory bandwidth are reached, and that kernels follow each "
            f"other without a gap, is assumed, not measured",
            f"collectives: {gpu.links.source}; all-gathers and all-to-alls as all-reduces of half the bytes",
            f"T4 sample: {terms.source}",
            f"T1, T2, T5: {host.source}",
        ),
        is_extrapolated=_never,
    )


def _never(plan: StepPlan) -> bool:
    del plan
    return False


class StepLimits(NamedTuple):
    """The most rows and tokens of a step."""

    rows: int
    tokens: int


def measured_limits(calibration: Calibration, *, depth: int) -> StepLimits:
    """The largest steps that were measured at every degree; raises ValueError for a depth that was not."""
    tables = [shard.at_depth(depth).steps for shard in calibration.shards]
    return StepLimits(
        rows=min(max(bucket.rows for bucket in table.buckets) for table in tables),
        tokens=min(max(bucket.tokens for bucket in table.buckets) for table in tables),
    )


def calibrated_model(
    calibration: Calibration,
    model: ModelConfig,
    gpu: Gpu,
    *,
    tp: int,
    depth: int,
    mode: SamplingMode,
    host: HostTerms | None = None,
) -> StepModel:
    """Steps as they were measured, with `gpu`'s collectives if one device ran the shard-shaped model.

    The host's terms are those measured, unless others are given. A shard-shaped sampler sampled all rows over
    a shard of the vocabulary, as much as a rank's part of sharded sampling; replicated is `tp` times that.
    Raises ValueError, with what was measured, for a degree or depth that was not.
    """
    shard = calibration.shard(tp)
    loop = shard.at_depth(depth)
    measured, links = shard.sampling.cost(greedy=False), gpu.links
    forward: Cost = loop.steps.forward_s
    sampling, assumed = measured, ""
    if shard.is_shard_shaped and tp > 1:
        forward = with_collectives(forward, model, links, tp=tp, dtype=Dtype(calibration.dtype))
        exchange = sampling_cost(SamplerTerms(row_s=0.0, source=""), model, links, tp=tp, mode=mode)
        times = tp if mode is SamplingMode.REPLICATED else 1
        assumed = f"collectives, assumed and not measured: {links.source}"

        def sampled(plan: StepPlan) -> float:
            return exchange(plan) + times * measured(plan)

        sampling = sampled
    terms = host or loop.host
    words = (f"steps and sampling: {calibration.source}, on {calibration.device}", assumed)
    return StepModel(
        forward=forward,
        sampling=sampling,
        host=terms,
        label=f"simulated (measured on {calibration.device})",
        sources=(*filter(None, words), f"T1, T2, T5: {terms.source}"),
        is_extrapolated=loop.steps.is_extrapolated,
    )
