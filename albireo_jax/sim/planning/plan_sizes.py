"""The question that a plan answers, and the degrees, memory and requests of a replica that fit it."""

from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.core.config import (
    MEMORY_SHARE,
    TP_DEGREES,
    CacheConfig,
    Dtype,
    KvDtype,
    SamplingMode,
)
from albireo_jax.core.errors import CapacityError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.memory import MemoryPlan, plan_memory, rules_bytes, weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.types import Request
from albireo_jax.sim.gpus import Gpu
from albireo_jax.sim.replica import Targets
from albireo_jax.sim.workload import Arrival, make_requests

_ROWS = (32, 64, 128, 256)
_STEP_TOKENS = (512, 1024, 2048, 4096)
REQUESTS_PER_REPLICA = 1000
_GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The plan that is wanted: of `num_gpus` GPUs for a model, a load and targets.

    Of each GPU's memory, `memory_share` is for weights and pages, as in an engine. All combinations of `rows`
    and `step_tokens` are tried as `max_rows` and `max_step_tokens`. A replica is simulated with
    `requests_per_replica` requests. Only `degrees` are tried.
    """

    name: str
    model: ModelConfig
    gpu: Gpu
    num_gpus: int
    targets: Targets
    arrivals: Sequence[Arrival]
    depth: int = 2
    sampling: SamplingMode = SamplingMode.SHARDED
    dtype: Dtype = Dtype.BFLOAT16
    kv_dtype: KvDtype = KvDtype.AUTO
    page_size: int = CacheConfig().page_size
    memory_share: float = MEMORY_SHARE
    rows: tuple[int, ...] = _ROWS
    step_tokens: tuple[int, ...] = _STEP_TOKENS
    requests_per_replica: int = REQUESTS_PER_REPLICA
    degrees: tuple[int, ...] = TP_DEGREES

    def __post_init__(self) -> None:
        """Refuse what no plan could be made for."""
        if self.num_gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.num_gpus}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must be above 0 and at most 1, got {self.memory_share}")
        if self.requests_per_replica < 2:
            raise ValueError(f"requests must be at least 2, got {self.requests_per_replica}")
        if not self.arrivals:
            raise ValueError("the trace has no requests: a plan needs at least 2 to have a rate")
        if not any(rows <= tokens for rows in self.rows for tokens in self.step_tokens):
            raise ValueError(
                f"no step of {max(self.step_tokens)} tokens has room for the {min(self.rows)} rows of the "
                f"smallest plan: give fewer rows or more step tokens"
            )

    @property
    def budget_bytes(self) -> int:
        """Bytes of a GPU for weights and pages."""
        return int(self.memory_share * self.gpu.memory_bytes)

    @property
    def rule_of_thumb(self) -> int:
        """Albireo's 4 M / C, weights over a GPU's memory, rounded up to a power of two."""
        quotient = 4 * weight_bytes(self.model, tp=1, dtype=self.dtype) / self.gpu.memory_bytes
        degree = 1
        while degree < quotient:
            degree *= 2
        return degree


@dataclass(frozen=True, slots=True, kw_only=True)
class Degree:
    """A tensor-parallel degree that fits, how often, and what one replica holds."""

    tp: int
    replicas: int
    memory: MemoryPlan
    limits: EngineLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A degree that is not tried, and why."""

    tp: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Degrees that fit, and degrees that do not."""

    fitting: tuple[Degree, ...]
    excluded: tuple[Excluded, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The part of a trace that a plan is for: in order of arrival, and without what no engine would take.

    `num_too_long` requests were longer than the model's context and `num_empty` had no prompt or no answer;
    a server refuses them.
    """

    arrivals: tuple[Arrival, ...]
    num_too_long: int
    num_empty: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(arrival.input_tokens + arrival.output_tokens for arrival in self.arrivals)

    @property
    def shares_prefixes(self) -> bool:
        """Whether some requests begin alike."""
        return any(arrival.block_ids for arrival in self.arrivals)


def read_workload(question: Question) -> Workload:
    """The requests of the trace that an engine would take; raises ValueError if they are fewer than two."""
    context = question.model.max_position
    whole = [each for each in question.arrivals if each.input_tokens > 0 and each.output_tokens > 0]
    kept = [each for each in whole if each.input_tokens + each.output_tokens <= context]
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of the {len(question.arrivals)} requests of the trace are left, a plan needs 2: "
            f"{len(whole) - len(kept)} are longer than the model's context of {context} tokens and "
            f"{len(question.arrivals) - len(whole)} are empty"
        )
    return Workload(
        arrivals=tuple(sorted(kept, key=lambda each: each.arrived_s)),
        num_too_long=len(whole) - len(kept),
        num_empty=len(question.arrivals) - len(whole),
    )


def replica_requests(question: Question, workload: Workload) -> list[Request]:
    """The requests of one replica, arrivals as they were: every n-th of the trace's beginning, for n GPUs.

    They are the same at every degree, or degrees would be compared by different parts of the trace. Where
    it is too short for that, n is smaller.
    """
    wanted = question.requests_per_replica
    stride = max(1, min(question.num_gpus, len(workload.arrivals) // wanted))
    chosen = workload.arrivals[: stride * wanted : stride]
    return make_requests(chosen, vocab_size=question.model.vocab_size, seed=0)


def fit(question: Question, workload: Workload) -> Degrees:
    """The degrees that divide the model and the GPUs, and hold the weights and the longest request.

    Raises ValueError, saying what would be possible, if there is none.
    """
    fitting: list[Degree] = []
    excluded: list[Excluded] = []
    for tp in question.model.tp_degrees():
        if tp not in question.degrees:
            excluded.append(Excluded(tp=tp, reason="nothing says what its steps take"))
            continue
        if question.num_gpus % tp:
            excluded.append(Excluded(tp=tp, reason=f"{question.num_gpus} GPUs are no multiple of {tp}"))
            continue
        try:
            fitting.append(_degree(question, workload, tp=tp))
        except CapacityError as error:
            excluded.append(Excluded(tp=tp, reason=str(error)))
    if not fitting:
        reasons = "; ".join(f"t={each.tp}: {each.reason}" for each in excluded)
        raise ValueError(
            f"{question.name} fits on {_gpus(question)} at no t. {reasons}. {_way_out(question)}"
        )
    return Degrees(fitting=tuple(fitting), excluded=tuple(excluded))


def _degree(question: Question, workload: Workload, *, tp: int) -> Degree:
    model = question.model
    counts_bytes = rules_bytes(model, tp=tp, num_slots=max(question.rows) + 1)
    weights = weight_bytes(model, tp=tp, dtype=question.dtype)
    if weights + counts_bytes > question.budget_bytes:
        raise CapacityError(
            f"{weights / _GB:.1f} GB of weights a GPU do not fit in {question.budget_bytes / _GB:.1f} GB"
        )
    memory = plan_memory(
        model,
        tp=tp,
        page_size=question.page_size,
        dtype=question.dtype,
        budget_bytes=question.budget_bytes - counts_bytes,
        kv_dtype=question.kv_dtype,
    )
    held = memory.num_pages * question.page_size
    if held < workload.longest:
        raise CapacityError(
            f"beside {weights / _GB:.1f} GB of weights a GPU there is room for {held} tokens, "
            f"the longest request of the trace has {workload.longest}"
        )
    return Degree(
        tp=tp,
        replicas=question.num_gpus // tp,
        memory=memory,
        limits=EngineLimits(
            max_model_len=min(model.max_position, held),
            vocab_size=model.vocab_size,
            num_pages=memory.num_pages,
            page_size=question.page_size,
        ),
    )


def _way_out(question: Question) -> str:
    """The number of GPUs that would do for a request of any length that the trace may have."""
    for tp in question.model.tp_degrees():
        if weight_bytes(question.model, tp=tp, dtype=question.dtype) < question.budget_bytes:
            return f"Its weights fit at t={tp}, on {tp} GPUs or a multiple of that"
    least = min(
        weight_bytes(question.model, tp=tp, dtype=question.dtype) for tp in question.model.tp_degrees()
    )
    return (
        f"Its weights take {least / _GB:.1f} GB a GPU at the highest t, so a GPU needs more than "
        f"{least / question.memory_share / _GB:.0f} GB of memory"
    )


def _gpus(question: Question) -> str:
    return f"{question.num_gpus} x {question.gpu.title}"
