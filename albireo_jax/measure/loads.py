"""The load of a sweep: one list of requests for the whole cluster, dealt to the replicas in turn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request
from albireo_jax.sim.workload import Arrival, make_requests, poisson_arrivals, read_trace, scale_lengths

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBatch:
    """`per_gpu` requests for each GPU of the cluster, all at once, as in the paper."""

    per_gpu: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        """Refuse loads that do nothing."""
        _at_least_one(batch_per_gpu=self.per_gpu, input_len=self.input_len, output_len=self.output_len)

    @property
    def label(self) -> str:
        """The load in a sentence."""
        return f"{self.per_gpu} requests per GPU at once, {self.input_len} tokens in, {self.output_len} out"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonLoad:
    """`count` requests of one length that come to the cluster at random moments, `rate_per_s` on average."""

    rate_per_s: float
    count: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        """Refuse loads that do nothing."""
        _at_least_one(requests=self.count, input_len=self.input_len, output_len=self.output_len)
        if not 0 < self.rate_per_s < float("inf"):
            raise ValueError(f"rate must be a number of requests per second above 0, got {self.rate_per_s:g}")

    @property
    def label(self) -> str:
        """The load in a sentence."""
        lengths = f"{self.input_len} tokens in, {self.output_len} out"
        return f"{self.count} requests at {self.rate_per_s:g} per second (Poisson), {lengths}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLoad:
    """A trace file's first `count` requests (None: all), lengths times `scale`, rate times `rate_scale`."""

    path: Path
    scale: float = 1.0
    rate_scale: float = 1.0
    count: int | None = None

    def __post_init__(self) -> None:
        """Refuse loads that do nothing."""
        for name, value in (("scale", self.scale), ("rate_scale", self.rate_scale)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value:g}")
        if self.count is not None:
            _at_least_one(requests=self.count)

    @property
    def label(self) -> str:
        """The load in a sentence."""
        first = "all" if self.count is None else f"the first {self.count}"
        return f"{first} requests of {self.path.name}, lengths x {self.scale:g}, rate x {self.rate_scale:g}"


OfferedLoad = FixedBatch | PoissonLoad | TraceLoad
"""A load that is offered to a cluster."""


def comes_at_once(load: OfferedLoad) -> bool:
    """Whether all requests are there from the start, so that throughput tells how fast the cluster is."""
    return isinstance(load, FixedBatch)


def cluster_arrivals(load: OfferedLoad, *, gpus: int, seed: int) -> list[Arrival]:
    """All requests that a cluster of `gpus` gets, in order of arrival, the first at 0 seconds or later.

    Raises ValueError for a trace that cannot be read or is empty.
    """
    match load:
        case FixedBatch():
            return [_arrival(load.input_len, load.output_len)] * (load.per_gpu * gpus)
        case PoissonLoad():
            lengths = [_arrival(load.input_len, load.output_len)]
            return poisson_arrivals(lengths, rate_per_s=load.rate_per_s, count=load.count, seed=seed)
        case TraceLoad():
            return _trace_arrivals(load)


def deal(items: Sequence[T], replicas: int) -> list[list[T]]:
    """Each replica's share of `items`, dealt in turn, in their order."""
    return [list(items[replica::replicas]) for replica in range(replicas)]


def sampled_requests(
    arrivals: Sequence[Arrival], *, vocab_size: int, seed: int, temperature: float, top_p: float
) -> list[Request]:
    """Requests with random prompts, drawn tokens and seeds of their own; none ends before its length."""
    requests = make_requests(arrivals, vocab_size=vocab_size, seed=seed)
    return [
        replace(request, sampling=TokenSampling(temperature=temperature, top_p=top_p, seed=index))
        for index, request in enumerate(requests)
    ]


def digest(arrivals: Sequence[Arrival]) -> str:
    """A digest that tells one list of arrivals from another."""
    rows = [
        (
            arrival.arrived_s,
            arrival.input_tokens,
            arrival.output_tokens,
            arrival.block_size,
            arrival.block_ids,
        )
        for arrival in arrivals
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _trace_arrivals(load: TraceLoad) -> list[Arrival]:
    arrivals = read_trace(load.path)
    if not arrivals:
        raise ValueError(f"trace {load.path} is empty: it needs at least one request under its header")
    arrivals = scale_lengths(sorted(arrivals[: load.count], key=_arrived), load.scale)
    first_s = arrivals[0].arrived_s
    return [
        replace(arrival, arrived_s=(arrival.arrived_s - first_s) / load.rate_scale) for arrival in arrivals
    ]


def _arrived(arrival: Arrival) -> float:
    return arrival.arrived_s


def _arrival(input_len: int, output_len: int) -> Arrival:
    return Arrival(arrived_s=0.0, input_tokens=input_len, output_tokens=output_len)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
