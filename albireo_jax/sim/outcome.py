"""A run as its users saw it: the times of each request's tokens, on any clock."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from albireo_jax.core.types import Request
from albireo_jax.sim.workload import TimedOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """A request's arrival, the times of its first and last token, and its number of tokens, at least one."""

    arrived_s: float
    first_s: float
    last_s: float
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there was only one."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    def meets(self, *, ttft_s: float, tpot_s: float) -> bool:
        """Whether the first token came in `ttft_s`, and the others, if any, in `tpot_s` each on average."""
        return self.ttft_s <= ttft_s and (self.tpot_s or 0.0) <= tpot_s


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All requests of a run, in order of arrival, which began and ended at these seconds."""

    requests: tuple[RequestTimes, ...]
    began_s: float
    ended_s: float

    @cached_property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(request.num_tokens for request in self.requests)

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of the run."""
        return self.num_tokens / (self.ended_s - self.began_s)

    @cached_property
    def ttft_s(self) -> tuple[float, ...]:
        """Time to the first token, of each request."""
        return tuple(request.ttft_s for request in self.requests)

    @cached_property
    def tpot_s(self) -> tuple[float, ...]:
        """Time per output token, of each request that has more than one."""
        return tuple(request.tpot_s for request in self.requests if request.tpot_s is not None)

    @property
    def ttft_p50_s(self) -> float:
        """Median time to the first token."""
        return statistics.median(self.ttft_s)

    @property
    def tpot_p50_s(self) -> float:
        """Median time per output token; raises ValueError if no request has more than one."""
        if not self.tpot_s:
            raise ValueError(f"none of {len(self.requests)} requests has more than one token")
        return statistics.median(self.tpot_s)

    def share_meeting(self, *, ttft_s: float, tpot_s: float) -> float:
        """Share of the requests whose first token came in `ttft_s` and the others in `tpot_s` each."""
        met = sum(request.meets(ttft_s=ttft_s, tpot_s=tpot_s) for request in self.requests)
        return met / len(self.requests)


def outcome(requests: Sequence[Request], outputs: Sequence[TimedOutput]) -> Outcome:
    """The times of `requests`, from outputs in the order in which they came; the run begins at second 0.

    Raises RuntimeError for a request that got no token: such a run says nothing of the others either.
    """
    moments: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for moment_s, output in outputs:
        if output.token_id is not None:
            moments[output.request_id].append(moment_s)
    empty = [request_id for request_id, seen in moments.items() if not seen]
    if empty:
        raise RuntimeError(f"{len(empty)} of {len(requests)} requests got no token, {empty[0]} is the first")
    return Outcome(
        requests=tuple(
            RequestTimes(arrived_s=request.arrived_s, first_s=seen[0], last_s=seen[-1], num_tokens=len(seen))
            for request, seen in zip(requests, moments.values(), strict=True)
        ),
        began_s=0.0,
        ended_s=max((moment_s for moment_s, _ in outputs), default=0.0),
    )
