"""The variants of an ablation in one process, measured in turn on engines that share all they can.

Depth is a number of the loop, so *synchronous* and *overlapped* run on one engine; sharded sampling has its
own programs, so it has another. Each run has a new scheduler: it begins with an empty cache and zero counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, Timeline
from albireo_jax.launch import Prepared
from albireo_jax.measure.kv_contention import ContentionMeter
from albireo_jax.measure.load_generator import run_load
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant, engine_sampling, engine_samplings


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSizes:
    """The sizes of an engine in the memory of a device."""

    num_pages: int
    page_bytes: int
    weight_bytes: int
    dtype: str
    vocab_size: int


class VariantEngines:
    """The engines that `variants` need at degree `tp`; `prepare` makes the one for a way to sample."""

    def __init__(
        self, variants: tuple[Variant, ...], prepare: Callable[[SamplingMode], Prepared], *, tp: int
    ) -> None:
        self._tp = tp
        self._engines = {sampling: prepare(sampling) for sampling in engine_samplings(variants, tp=tp)}

    @property
    def sizes(self) -> ReplicaSizes:
        """The sizes of each engine."""
        engine = next(iter(self._engines.values()))
        return ReplicaSizes(
            num_pages=engine.memory.num_pages,
            page_bytes=engine.memory.page_bytes,
            weight_bytes=engine.memory.weight_bytes,
            dtype=engine.dtype.value,
            vocab_size=engine.limits.vocab_size,
        )

    def run(self, variant: Variant, requests: list[Request]) -> ReplicaRun:
        """All `requests`, in order of arrival, through a loop of this variant.

        Raises ValueError if the engine could never finish one of them.
        """
        engine = self._engines[engine_sampling(variant, tp=self._tp)]
        config = engine.config.scheduler
        timeline = Timeline(capacity=ALL_STEPS)
        scheduler = Scheduler(config, engine.limits)
        meter = ContentionMeter(
            engine.executor,
            scheduler,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            clock=timeline.clock,
        )
        loop = EngineLoop(scheduler, meter, depth=variant.depth, timeline=timeline)
        before = engine.energy.read()
        outcome = run_load(loop, engine.limits, requests)
        energy = engine.energy.read().since(before)
        return ReplicaRun(
            seconds=outcome.ended_s - outcome.began_s,
            num_tokens=outcome.num_tokens,
            ttft_s=outcome.ttft_s,
            tpot_s=outcome.tpot_s,
            table=timeline.table(),
            kv=meter.use(),
            energy_j=energy.joules,
            energy_reason=energy.reason,
        )
