"""At which t a model serves a fixed batch fastest on N simulated GPUs, and which term of a step decides it.

Each of N/t replicas has `ROWS_PER_GPU` rows per GPU, as in the paper (arXiv 2606.01927), and all its
requests at once. Three engines, one ablation: *synchronous* (depth 1, replicated sampling), *overlapped*
(depth 2), and *overlapped + sharded* sampling. What a step takes is a `Terms`; nothing is measured on a GPU.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from albireo_jax.core.config import ModelConfig, SamplingMode, SchedulerConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import Request
from albireo_jax.sim.gpus import Gpu
from albireo_jax.sim.host import NO_HOST, HostTerms
from albireo_jax.sim.lanes import Cost
from albireo_jax.sim.planning.plan_sizes import Degree, Question, fit, read_workload
from albireo_jax.sim.replica import Replica, Targets, run
from albireo_jax.sim.step_model import SamplerTerms, StepModel, roofline_model
from albireo_jax.sim.workload import Arrival, make_requests

ROWS_PER_GPU = 32
_STEP_TOKENS = 2048
_ANY = Targets(ttft_s=1e9, tpot_s=1e9)
PAPER_TP = {7: (1, 1), 8: (1, 1), 13: (1, 2), 14: (1, 2), 32: (2, 4), 70: (4, 8), 72: (4, 8)}
"""The t_e that the paper found for vLLM 0.11.2 and for Albireo, by 10^9 parameters; 8 as 7."""


class Ablation(StrEnum):
    """Engines, each with one more of the paper's mechanisms."""

    SYNCHRONOUS = "synchronous"
    OVERLAPPED = "overlapped"
    SHARDED = "overlapped + sharded"

    @property
    def depth(self) -> int:
        """Steps in flight."""
        return 1 if self is Ablation.SYNCHRONOUS else 2

    @property
    def sampling(self) -> SamplingMode:
        """Where rows are sampled."""
        return SamplingMode.SHARDED if self is Ablation.SHARDED else SamplingMode.REPLICATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What steps take: the host, the sampler (None: this project's), and the roofline's forward, slowed."""

    name: str
    host: HostTerms
    sampler: SamplerTerms | None = None
    forward_factor: float = 1.0

    def steps(self, model: ModelConfig, gpu: Gpu, *, tp: int, mode: SamplingMode) -> StepModel:
        """The steps of a replica."""
        steps = roofline_model(model, gpu, tp=tp, host=self.host, mode=mode, sampler=self.sampler)
        return replace(steps, forward=_slower(steps.forward, self.forward_factor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The load: prompts and answers of these lengths, `ROWS_PER_GPU` requests for each GPU at once."""

    input_tokens: int
    output_tokens: int

    def requests(self, *, rows: int, vocab_size: int) -> list[Request]:
        """The requests of a replica."""
        arrival = Arrival(arrived_s=0.0, input_tokens=self.input_tokens, output_tokens=self.output_tokens)
        return make_requests([arrival] * rows, vocab_size=vocab_size, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One engine at one degree: tokens per second of all replicas, and milliseconds of a step's parts.

    `task_ms` are means over all steps: T3 and T4 on the device, and what the host exposed.
    """

    tp: int
    tokens_per_s: float
    task_ms: Mapping[str, float]
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeSweep:
    """The points of a model by engine, smallest degree first, and why other degrees are not among them."""

    name: str
    rule_of_thumb: int
    points: Mapping[Ablation, tuple[Point, ...]]
    excluded: Mapping[int, str]

    def best(self, ablation: Ablation) -> Point:
        """The point at t_e: of the most tokens per second, of equal ones that of the smallest degree."""
        return max(self.points[ablation], key=lambda point: point.tokens_per_s)


def te_sweep(
    name: str, model: ModelConfig, gpu: Gpu, *, num_gpus: int, terms: Terms, batch: Batch
) -> TeSweep:
    """Every engine at every degree that fits; raises ValueError where none does."""
    question = Question(
        name=name,
        model=model,
        gpu=gpu,
        num_gpus=num_gpus,
        targets=_ANY,
        arrivals=[Arrival(arrived_s=0.0, input_tokens=batch.input_tokens, output_tokens=batch.output_tokens)]
        * 2,
        rows=(ROWS_PER_GPU * num_gpus,),
        step_tokens=(_STEP_TOKENS,),
    )
    degrees = fit(question, read_workload(question))
    points = {
        ablation: tuple(
            _point(_replica(question, degree, terms, ablation), batch, degree) for degree in degrees.fitting
        )
        for ablation in Ablation
    }
    return TeSweep(
        name=name,
        rule_of_thumb=question.rule_of_thumb,
        points=points,
        excluded={each.tp: each.reason for each in degrees.excluded},
    )


def _replica(question: Question, degree: Degree, terms: Terms, ablation: Ablation) -> Replica:
    return Replica(
        config=SchedulerConfig(
            max_rows=ROWS_PER_GPU * degree.tp, max_step_tokens=_STEP_TOKENS, depth=ablation.depth
        ),
        limits=degree.limits,
        steps=terms.steps(question.model, question.gpu, tp=degree.tp, mode=ablation.sampling),
        shares_prefixes=False,
    )


def why(sweep: TeSweep, ablation: Ablation, expected: int) -> str:
    """Which parts of a step make the t_e found better than the one expected, or "" if they are the same.

    All replicas together have the same rows at any t, so that the shorter step serves more.
    """
    best = sweep.best(ablation)
    if best.tp == expected:
        return ""
    others = [point for point in sweep.points[ablation] if point.tp == expected]
    if not others:
        return (
            f"t={expected} is not possible: {sweep.excluded.get(expected, 'the model does not divide by it')}"
        )
    (other,) = others
    parts = {name: other.task_ms[name] - best.task_ms[name] for name in best.task_ms}
    told = ", ".join(
        f"{name} {best.task_ms[name]:.2f} to {other.task_ms[name]:.2f} ms ({difference:+.2f})"
        for name, difference in sorted(parts.items(), key=lambda part: -part[1])
    )
    loss = other.tokens_per_s / best.tokens_per_s - 1
    return f"t={expected} serves {loss:+.1%}; from t={best.tp} to it: {told}"


def _point(replica: Replica, batch: Batch, degree: Degree) -> Point:
    requests = batch.requests(rows=replica.config.max_rows, vocab_size=replica.limits.vocab_size)
    done = run(replica, requests)
    per_step_ms = 1e3 / max(done.tasks.steps, 1)
    tasks = {task.name: task for task in done.tasks.tasks}
    on_device = {name: task.total_s for name, task in tasks.items() if task.on_device}
    return Point(
        tp=degree.tp,
        tokens_per_s=degree.replicas * done.outcome.output_tokens_per_s,
        task_ms={
            **{name: seconds * per_step_ms for name, seconds in on_device.items()},
            "exposed host": done.tasks.exposed_s * per_step_ms,
        },
        preemptions=done.pressure.preemptions,
    )


def forward_factor(
    model: ModelConfig, gpu: Gpu, *, tp: int, rows: int, context: int, seconds: float
) -> float:
    """How much slower than the roofline a decode step's forward pass is that takes so many seconds."""
    free = Terms(name="", host=NO_HOST).steps(model, gpu, tp=tp, mode=SamplingMode.REPLICATED)
    return seconds / free.forward(decode_step(rows, context=context))


def decode_step(rows: int, *, context: int) -> StepPlan:
    """A step of rows that each compute one token behind so many that are cached."""
    none = np.zeros(0, np.int32)
    return StepPlan(
        step=0,
        request_ids=tuple(map(str, range(rows))),
        epochs=np.zeros(rows, np.int32),
        slots=np.arange(rows, dtype=np.int32),
        starts=np.full(rows, context, np.int32),
        counts=np.ones(rows, np.int32),
        samples=np.ones(rows, np.bool_),
        token_ids=np.zeros(rows, np.int32),
        update_slots=none,
        update_columns=none,
        update_pages=none,
    )


def expected_tp(name: str, ablation: Ablation) -> int | None:
    """The paper's t_e for a model of this size, None if it names none: vLLM's for the synchronous engine."""
    size = re.search(r"(\d+)b\b", name, re.IGNORECASE)
    found = PAPER_TP.get(int(size[1])) if size else None
    return None if found is None else found[0 if ablation is Ablation.SYNCHRONOUS else 1]


def _slower(cost: Cost, factor: float) -> Cost:
    def slowed(plan: StepPlan) -> float:
        return factor * cost(plan)

    return slowed
