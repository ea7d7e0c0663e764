"""The cases of a sweep: what its workers measure, checked against model and memory before any starts."""

import math
from dataclasses import dataclass

from albireo_jax.core.config import (
    MEMORY_SHARE,
    CacheConfig,
    Dtype,
    EngineConfig,
    ParallelConfig,
    SamplingMode,
    SchedulerConfig,
)
from albireo_jax.core.errors import CapacityError
from albireo_jax.core.memory import page_bytes, plan_memory, rules_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.sim.workload import Arrival
from albireo_jax.sweep.sweep_settings import SweepSettings, Variant, engine_samplings, listed


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCase:
    """Variants at one degree that one group of workers measures, on the engine that these sizes make.

    `measured_replicas` of `num_replicas` run. `num_pages` None fills the memory of the device.
    """

    tp: int
    variants: tuple[Variant, ...]
    num_replicas: int
    measured_replicas: int
    virtual: bool
    max_rows: int
    max_step_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int | None

    @property
    def name(self) -> str:
        """The case in a file name; unique in a sweep."""
        slugs = [variant.slug for variant in self.variants]
        return "-".join((f"tp{self.tp}", *(slugs if len(slugs) == 1 else ())))

    @property
    def how(self) -> str:
        """The way in which the figures of the cluster come about; stands beside each of them."""
        if self.measured_replicas < self.num_replicas:
            how = f"one of {self.num_replicas} replicas measured, times {self.num_replicas}"
        elif self.num_replicas == 1:
            how = "the one replica measured"
        else:
            how = f"all {self.num_replicas} replicas measured side by side, summed"
        devices = self.tp * self.measured_replicas
        noun = "device shares" if devices == 1 else "devices share"
        return f"{how}; {devices} virtual {noun} the machine's cores" if self.virtual else how

    @property
    def replicas(self) -> str:
        """The same in short."""
        counts = f"{self.measured_replicas} of {self.num_replicas}"
        return f"{counts}, virtual" if self.virtual else counts

    def engine_config(self, model: str, sampling: SamplingMode, *, dtype: Dtype | None) -> EngineConfig:
        """The engine of a replica that samples in this way."""
        return EngineConfig(
            model=model,
            dtype=dtype,
            max_model_len=self.max_model_len,
            max_logprobs=0,
            sampling=sampling,
            parallel=ParallelConfig(tp=self.tp, virtual_devices=self.tp if self.virtual else 0),
            cache=CacheConfig(page_size=self.page_size, num_pages=self.num_pages),
            scheduler=SchedulerConfig(max_rows=self.max_rows, max_step_tokens=self.max_step_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """The rule of thumb 4M/C for t_e: M bytes of weights over C bytes per GPU; None where C is not known."""

    weight_bytes: int
    gpu_memory_bytes: int | None

    @property
    def value(self) -> float | None:
        """4M/C."""
        return None if self.gpu_memory_bytes is None else 4 * self.weight_bytes / self.gpu_memory_bytes

    @property
    def tp(self) -> int | None:
        """4M/C rounded up to a power of two, at least 1."""
        return None if self.value is None else 2 ** max(0, math.ceil(math.log2(self.value)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Settings that were found possible, and their cases; all variants of a degree are adjacent."""

    settings: SweepSettings
    model: ModelConfig
    dtype: Dtype
    arrivals: tuple[Arrival, ...]
    rule: MemoryRule
    cases: tuple[SweepCase, ...]


def plan_sweep(
    settings: SweepSettings,
    model: ModelConfig,
    arrivals: tuple[Arrival, ...],
    *,
    device_memory_bytes: int | None,
) -> SweepPlan:
    """The cases of a sweep of a model under a load; `device_memory_bytes` of a GPU are None if it is virtual.

    Raises ValueError, naming the degrees that are possible, if one of the sweep does not divide the model or
    does not fit in the memory of its GPUs; also if a request is too long or a replica would get none.
    """
    dtype = settings.dtype or (Dtype.FLOAT32 if settings.virtual_devices else Dtype.BFLOAT16)
    divisors = [t for t in model.tp_degrees() if settings.gpus % t == 0]
    for tp in settings.degrees:
        if tp not in divisors:
            try:
                model.check_tp(tp)
            except ValueError as error:
                possible = f"with {settings.gpus} GPUs: {listed(divisors)}"
                raise ValueError(f"{error}; {possible}") from None
    longest = max(arrival.input_tokens + arrival.output_tokens for arrival in arrivals)
    if longest > model.max_position:
        raise ValueError(
            f"the longest request has {longest} tokens, the model's limit is {model.max_position}; a trace "
            f"fits with --scale {_floor(model.max_position / longest)} or less"
        )
    most_replicas = settings.gpus // min(settings.degrees)
    if len(arrivals) < most_replicas:
        raise ValueError(
            f"{len(arrivals)} requests leave some of the {most_replicas} replicas of tp "
            f"{min(settings.degrees)} without any; at least {most_replicas} are needed"
        )
    memory_bytes = settings.gpu_memory_bytes or device_memory_bytes
    pages = _Pages(settings, model, dtype=dtype, max_model_len=longest, memory_bytes=memory_bytes)
    pages.check(divisors)
    return SweepPlan(
        settings=settings,
        model=model,
        dtype=dtype,
        arrivals=arrivals,
        rule=MemoryRule(weight_bytes=weight_bytes(model, tp=1, dtype=dtype), gpu_memory_bytes=memory_bytes),
        cases=_cases(settings, pages, max_model_len=longest),
    )


def _cases(settings: SweepSettings, pages: "_Pages", *, max_model_len: int) -> tuple[SweepCase, ...]:
    virtual = settings.virtual_devices > 0
    groups = [settings.variants] if settings.interleaved else [(one,) for one in settings.variants]
    return tuple(
        SweepCase(
            tp=tp,
            variants=variants,
            num_replicas=settings.gpus // tp,
            measured_replicas=1 if settings.one_replica else settings.gpus // tp,
            virtual=virtual,
            max_rows=settings.rows_per_gpu * tp,
            max_step_tokens=max(settings.max_step_tokens, settings.rows_per_gpu * tp),
            max_model_len=max_model_len,
            page_size=settings.page_size,
            num_pages=pages.of(tp) if virtual or settings.gpu_memory_bytes else None,
        )
        for tp in settings.degrees
        for variants in groups
    )


class _Pages:
    """KV pages of an engine at each degree, by arithmetic; engines that are measured in turn share a GPU."""

    def __init__(
        self,
        settings: SweepSettings,
        model: ModelConfig,
        *,
        dtype: Dtype,
        max_model_len: int,
        memory_bytes: int | None,
    ) -> None:
        self._settings = settings
        self._model = model
        self._dtype = dtype
        self._memory_bytes = memory_bytes
        self._pages_per_row = -(-max_model_len // settings.page_size)

    def of(self, tp: int) -> int:
        """Pages for all rows, or as many as fit beside the weights; CapacityError if too few."""
        max_rows = self._settings.rows_per_gpu * tp
        enough = max_rows * (self._pages_per_row + 1)  # a request starts if a page is left for each that runs
        if self._memory_bytes is None:
            return enough
        counts_bytes = rules_bytes(self._model, tp=tp, num_slots=max_rows + 1)
        plan = plan_memory(
            self._model,
            tp=tp,
            page_size=self._settings.page_size,
            dtype=self._dtype,
            budget_bytes=int(self._memory_bytes * MEMORY_SHARE) // self._engines(tp) - counts_bytes,
            max_pages=enough,
        )
        if plan.num_pages < self._pages_per_row:
            raise CapacityError(
                f"beside the weights there is room for {plan.num_pages} KV pages, the longest request needs "
                f"{self._pages_per_row}"
            )
        return plan.num_pages

    def check(self, divisors: list[int]) -> None:
        """Raise ValueError, naming the degrees that fit, if one of the settings does not."""
        reasons: dict[int, str] = {}
        for tp in divisors:
            try:
                self.of(tp)
            except CapacityError as error:
                reasons[tp] = str(error)
        failing = [tp for tp in self._settings.degrees if tp in reasons]
        if failing:
            fits = [tp for tp in divisors if tp not in reasons]
            verdict = (
                f"it fits at tp {listed(fits)}"
                if fits
                else f"it fits at no degree, and at tp {divisors[-1]} in {self._least_gib(divisors[-1])} GiB"
            )
            memory = (self._memory_bytes or 0) / 2**30
            raise ValueError(
                f"the model does not fit at tp {failing[0]} in {memory:.3g} GiB per GPU "
                f"({reasons[failing[0]]}); {verdict}"
            )

    def _least_gib(self, tp: int) -> str:
        """Memory in which the longest request fits, three digits rounded up."""
        settings, model = self._settings, self._model
        page = page_bytes(model, tp=tp, page_size=settings.page_size, dtype=self._dtype)
        counts = rules_bytes(model, tp=tp, num_slots=settings.rows_per_gpu * tp + 1)
        weights = weight_bytes(model, tp=tp, dtype=self._dtype)
        needed = (weights + counts + (self._pages_per_row + 1) * page) * self._engines(tp) / MEMORY_SHARE
        return f"{1.005 * needed / 2**30:.3g}"

    def _engines(self, tp: int) -> int:
        """Engines that a GPU holds at once; virtual devices have the memory that they are said to have."""
        if self._settings.virtual_devices or not self._settings.interleaved:
            return 1
        return len(engine_samplings(self._settings.variants, tp=tp))


def _floor(value: float) -> float:
    """Two digits, rounded down."""
    digits = 1 - math.floor(math.log10(value))
    return math.floor(value * 10**digits) / 10**digits
