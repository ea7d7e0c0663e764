"""The load that a report is on: random prompts at once, or the first requests of a trace at their times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albireo_jax.core.types import Request
from albireo_jax.measure.loads import FixedBatch, TraceLoad, cluster_arrivals, sampled_requests
from albireo_jax.sim.workload import Arrival

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportLoad:
    """`requests` with random prompts and drawn tokens; none ends before its length.

    They have `input_len` and `output_len` tokens and come at once, or, with a `trace`, its lengths times
    `scale` at its times. Raises ValueError for a load that does nothing.
    """

    requests: int
    input_len: int
    output_len: int
    trace: Path | None = None
    scale: float = 1.0
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    @property
    def label(self) -> str:
        """The load in a sentence."""
        if self.trace is not None:
            what = TraceLoad(path=self.trace, scale=self.scale, count=self.requests).label
        else:
            what = f"{self.requests} requests at once, {self.input_len} tokens in, {self.output_len} out"
        return f"{what}; temperature {self.temperature:g}, top-p {self.top_p:g}"

    def arrivals(self) -> list[Arrival]:
        """Arrival times and lengths of the requests; ValueError for a trace that is broken or empty."""
        if self.trace is not None:
            load = TraceLoad(path=self.trace, scale=self.scale, count=self.requests)
        else:
            load = FixedBatch(per_gpu=self.requests, input_len=self.input_len, output_len=self.output_len)
        return cluster_arrivals(load, gpus=1, seed=self.seed)

    def to_run(self, arrivals: Sequence[Arrival], *, vocab_size: int) -> list[Request]:
        """The requests, in order of arrival."""
        return self._requests(arrivals, vocab_size=vocab_size, seed=self.seed)

    def warm_up(self, arrivals: Sequence[Arrival], *, vocab_size: int) -> list[Request]:
        """Requests with other prompts that come at once and end soon."""
        others = self._requests(arrivals, vocab_size=vocab_size, seed=self.seed + 1)
        return [
            replace(request, arrived_s=0.0, max_tokens=min(_WARM_UP_TOKENS, request.max_tokens))
            for request in others
        ]

    def _requests(self, arrivals: Sequence[Arrival], *, vocab_size: int, seed: int) -> list[Request]:
        return sampled_requests(
            arrivals, vocab_size=vocab_size, seed=seed, temperature=self.temperature, top_p=self.top_p
        )
