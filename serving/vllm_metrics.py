"""The metrics that vLLM has too, under its names, types and labels.

Boards, gateways and autoscalers that read a vLLM server so read this one. As there, every metric has the
labels `model_name` and `engine`; there is one engine, "0". The buckets of the histograms are ours.
"""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import FinishReason
from albireo_jax.engine.request_metrics import HistogramSnapshot, MetricsSnapshot
from albireo_jax.sched.scheduler_stats import SchedulerStats

_LABELS = ("model_name", "engine")
_ENGINE = "0"


def vllm_families(
    stats: SchedulerStats, requests: MetricsSnapshot, limits: EngineLimits, *, model_name: str
) -> Iterator[Metric]:
    """All families under vLLM's names."""
    yield from _ScheduledFamilies(model_name).of(stats)
    yield from _RequestFamilies(model_name).of(requests)
    yield _cache_config(limits)


def histogram_buckets(snapshot: HistogramSnapshot) -> list[tuple[str, float]]:
    """Upper bounds and the values at or below them, as Prometheus takes them."""
    buckets = [
        (str(bound), float(count)) for bound, count in zip(snapshot.bounds, snapshot.cumulative, strict=True)
    ]
    return [*buckets, ("+Inf", float(snapshot.count))]


class _Families:
    """Makes families with the labels of one engine."""

    def __init__(self, model_name: str) -> None:
        self._values = (model_name, _ENGINE)

    def gauge(self, name: str, documentation: str, value: float) -> Metric:
        """A gauge."""
        family = GaugeMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def counter(self, name: str, documentation: str, value: float) -> Metric:
        """A counter, whose name ends in `_total` when it is read."""
        family = CounterMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def histogram(self, name: str, documentation: str, snapshot: HistogramSnapshot) -> Metric:
        """A histogram of seconds."""
        family = HistogramMetricFamily(name, documentation, labels=_LABELS)
        family.add_metric(self._values, histogram_buckets(snapshot), snapshot.sum)
        return family


class _ScheduledFamilies(_Families):
    """Requests and pages as the scheduler counts them."""

    def of(self, stats: SchedulerStats) -> Iterator[Metric]:
        """The families of a moment's figures."""
        running, usage = stats.running + stats.finishing, stats.pages_in_use / stats.num_pages
        yield self.gauge("vllm:num_requests_running", "As albireo_requests_running", running)
        yield self.gauge("vllm:num_requests_waiting", "As albireo_requests_waiting", stats.waiting)
        yield self.gauge("vllm:kv_cache_usage_perc", "Share of the KV pages that requests own, 0 to 1", usage)
        yield self.counter("vllm:num_preemptions", "As albireo_preemptions_total", stats.preemptions)
        yield self.counter(
            "vllm:prefix_cache_queries", "As albireo_prefix_query_tokens_total", stats.cache.prompt_tokens
        )
        yield self.counter(
            "vllm:prefix_cache_hits", "As albireo_prefix_hit_tokens_total", stats.cache.cached_tokens
        )


class _RequestFamilies(_Families):
    """Tokens and latencies of requests."""

    def of(self, requests: MetricsSnapshot) -> Iterator[Metric]:
        """The families of the totals since the start."""
        yield self.counter("vllm:prompt_tokens", "As albireo_prompt_tokens_total", requests.prompt_tokens)
        yield self.counter(
            "vllm:generation_tokens", "As albireo_generation_tokens_total", requests.generated_tokens
        )
        yield self._finished(requests.finished)
        yield self.histogram(
            "vllm:time_to_first_token_seconds",
            "As albireo_time_to_first_token_seconds",
            requests.first_token_s,
        )
        yield self.histogram(
            "vllm:inter_token_latency_seconds",
            "As albireo_inter_token_latency_seconds",
            requests.inter_token_s,
        )
        yield self.histogram(
            "vllm:e2e_request_latency_seconds", "As albireo_request_latency_seconds", requests.request_s
        )
        yield self.histogram(
            "vllm:request_queue_time_seconds", "As albireo_request_queue_seconds", requests.queue_s
        )
        yield self.histogram(
            "vllm:request_prefill_time_seconds", "As albireo_request_prefill_seconds", requests.prefill_s
        )
        yield self.histogram(
            "vllm:request_decode_time_seconds", "As albireo_request_decode_seconds", requests.decode_s
        )

    def _finished(self, finished: dict[FinishReason, int]) -> Metric:
        family = CounterMetricFamily(
            "vllm:request_success", "As albireo_requests_finished_total", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in finished.items():
            family.add_metric((*self._values, reason.value), count)
        return family


def _cache_config(limits: EngineLimits) -> Metric:
    """The KV cache as gateways read it: a gauge of 1 whose labels describe it."""
    family = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Tokens of a KV page, and pages on the devices and on the host",
        labels=("block_size", "num_gpu_blocks", "num_cpu_blocks", "engine"),
    )
    counts = (limits.page_size, limits.num_pages, limits.num_host_pages)
    family.add_metric([*map(str, counts), _ENGINE], 1)
    return family
