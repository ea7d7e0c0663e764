"""Counters and latency histograms of the requests that pass through a frontend."""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from albireo_jax.core.types import FinishReason

TOKEN_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
FIRST_TOKEN_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
REQUEST_BOUNDS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramSnapshot:
    """Values seen so far: how many lie at or below each bound, how many in all, and their sum."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    count: int
    sum: float


class Histogram:
    """Counts of values between fixed upper bounds; not thread-safe by itself."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> HistogramSnapshot:
        """The values seen so far."""
        cumulative: list[int] = []
        total = 0
        for count in self._counts:
            total += count
            cumulative.append(total)
        return HistogramSnapshot(
            bounds=self._bounds, cumulative=tuple(cumulative[:-1]), count=total, sum=self._sum
        )


@dataclass(slots=True, kw_only=True)
class Tally:
    """One batch of outputs, counted: one thread fills it, then `record` adds it to the metrics whole."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    queue_s: list[float] = field(default_factory=list[float])
    prefill_s: list[float] = field(default_factory=list[float])
    decode_s: list[float] = field(default_factory=list[float])
    first_token_s: list[float] = field(default_factory=list[float])
    inter_token_s: list[float] = field(default_factory=list[float])
    request_s: list[float] = field(default_factory=list[float])
    finished: list[FinishReason] = field(default_factory=list[FinishReason])


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """Totals since the start; times in seconds.

    `prompt_tokens` counts the prompts of requests that got a first token; `finished` counts requests
    by reason, those whose reader left as aborted. `queue_s` is from arrival to start, `prefill_s` from there
    to the first token, `decode_s` from there to the end.
    """

    prompt_tokens: int
    generated_tokens: int
    queue_s: HistogramSnapshot
    prefill_s: HistogramSnapshot
    decode_s: HistogramSnapshot
    first_token_s: HistogramSnapshot
    inter_token_s: HistogramSnapshot
    request_s: HistogramSnapshot
    finished: dict[FinishReason, int]


class RequestMetrics:
    """Totals over all requests; any thread may record or take a snapshot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._queue_s = Histogram(FIRST_TOKEN_BOUNDS_S)
        self._prefill_s = Histogram(FIRST_TOKEN_BOUNDS_S)
        self._decode_s = Histogram(REQUEST_BOUNDS_S)
        self._first_token_s = Histogram(FIRST_TOKEN_BOUNDS_S)
        self._inter_token_s = Histogram(TOKEN_BOUNDS_S)
        self._request_s = Histogram(REQUEST_BOUNDS_S)
        self._finished = dict.fromkeys(FinishReason, 0)

    def record(self, tally: Tally) -> None:
        """Add what a batch of outputs brought."""
        with self._lock:
            self._prompt_tokens += tally.prompt_tokens
            self._generated_tokens += tally.generated_tokens
            for histogram, values in (
                (self._queue_s, tally.queue_s),
                (self._prefill_s, tally.prefill_s),
                (self._decode_s, tally.decode_s),
                (self._first_token_s, tally.first_token_s),
                (self._inter_token_s, tally.inter_token_s),
                (self._request_s, tally.request_s),
            ):
                for value in values:
                    histogram.observe(value)
            for reason in tally.finished:
                self._finished[reason] += 1

    def snapshot(self) -> MetricsSnapshot:
        """Totals so far, all of one moment."""
        with self._lock:
            return MetricsSnapshot(
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                queue_s=self._queue_s.snapshot(),
                prefill_s=self._prefill_s.snapshot(),
                decode_s=self._decode_s.snapshot(),
                first_token_s=self._first_token_s.snapshot(),
                inter_token_s=self._inter_token_s.snapshot(),
                request_s=self._request_s.snapshot(),
                finished=dict(self._finished),
            )


def add_metrics(parts: Sequence[MetricsSnapshot]) -> MetricsSnapshot:
    """The totals of several frontends, at least one."""
    return MetricsSnapshot(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        generated_tokens=sum(part.generated_tokens for part in parts),
        queue_s=_add_histograms([part.queue_s for part in parts]),
        prefill_s=_add_histograms([part.prefill_s for part in parts]),
        decode_s=_add_histograms([part.decode_s for part in parts]),
        first_token_s=_add_histograms([part.first_token_s for part in parts]),
        inter_token_s=_add_histograms([part.inter_token_s for part in parts]),
        request_s=_add_histograms([part.request_s for part in parts]),
        finished={reason: sum(part.finished[reason] for part in parts) for reason in FinishReason},
    )


def _add_histograms(parts: Sequence[HistogramSnapshot]) -> HistogramSnapshot:
    return HistogramSnapshot(
        bounds=parts[0].bounds,
        cumulative=tuple(map(sum, zip(*(part.cumulative for part in parts), strict=True))),
        count=sum(part.count for part in parts),
        sum=sum(part.sum for part in parts),
    )
