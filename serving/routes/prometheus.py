"""GET /metrics: requests, cache, latencies, ways to sample, tasks and energy, for Prometheus.

Metrics of our own are named `albireo_…`. Those that vLLM has too stand under its names besides, so that
boards, gateways and autoscalers made for it work here; see `serving.vllm_metrics`.
"""

from collections.abc import Iterator, Mapping

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from albireo_jax.engine.energy import EnergyReading
from albireo_jax.engine.engine_client import EngineFigures
from albireo_jax.engine.request_metrics import HistogramSnapshot, MetricsSnapshot
from albireo_jax.engine.timeline import RouteTotals, TaskTable
from albireo_jax.sched.kv_pages import KvPageStats
from albireo_jax.sched.prefix_cache import CacheStats
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.serving.dependencies import EngineDependency, ServedEngine
from albireo_jax.serving.vllm_metrics import histogram_buckets, vllm_families

_OPENMETRICS = "application/openmetrics-text"
_OPENMETRICS_1_0_0 = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, engine: EngineDependency) -> Response:
    """All figures, of this moment: as Prometheus text, or as OpenMetrics to whom accepts that."""
    registry = CollectorRegistry()
    registry.register(_EngineCollector(engine, await engine.figures()))
    # Not the library's own choice: its default escaping turns the colon in vLLM's names into an underscore.
    accepted = [each.partition(";")[0].strip() for each in request.headers.get("accept", "").split(",")]
    if _OPENMETRICS in accepted:
        text, content_type = generate_openmetrics(registry, escaping=ALLOWUTF8), _OPENMETRICS_1_0_0
    else:
        text, content_type = generate_latest(registry, escaping=ALLOWUTF8), CONTENT_TYPE_PLAIN_0_0_4
    return Response(text, headers={"Content-Type": content_type})


class _EngineCollector(Collector):
    """Reads an engine's figures when it is scraped; nothing is kept here."""

    def __init__(self, engine: ServedEngine, figures: EngineFigures) -> None:
        self._engine = engine
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """All families."""
        engine, figures = self._engine, self._figures
        stats = engine.service.stats()
        yield from _scheduler_families(stats)
        yield from _cache_families(stats.tiers, stats.cache)
        requests = engine.request_totals()
        yield from _request_families(requests)
        yield from _latency_families(requests)
        yield from _sampling_families(figures.routes)
        yield from _task_families(figures.table)
        yield from _energy_families(figures.energy, output_tokens=requests.generated_tokens)
        yield from vllm_families(stats, requests, engine.limits, model_name=engine.served_name)


def _scheduler_families(stats: SchedulerStats) -> Iterator[Metric]:
    running = stats.running + stats.finishing
    yield GaugeMetricFamily("albireo_requests_running", "Requests being computed", value=running)
    yield GaugeMetricFamily("albireo_requests_waiting", "Requests in the queue", value=stats.waiting)
    yield CounterMetricFamily("albireo_steps", "Steps planned", value=stats.steps)
    yield CounterMetricFamily("albireo_preemptions", "Requests that were preempted", value=stats.preemptions)
    yield CounterMetricFamily(
        "albireo_nonfinite_rows",
        "Rows whose logits were not finite, which ended their requests",
        value=stats.nonfinite,
    )


def _cache_families(tiers: KvPageStats, cache: CacheStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("albireo_kv_pages_in_use", "KV pages that requests own", value=tiers.in_use)
    yield GaugeMetricFamily(
        "albireo_kv_pages_idle",
        "KV pages that no request owns, kept for the prefixes in them until they are needed",
        value=tiers.idle,
    )
    yield GaugeMetricFamily("albireo_kv_pages", "KV pages in all", value=tiers.num_pages)
    yield GaugeMetricFamily(
        "albireo_kv_host_pages_in_use", "KV pages of the host that hold prefixes", value=tiers.host_in_use
    )
    yield GaugeMetricFamily("albireo_kv_host_pages", "KV pages of the host", value=tiers.num_host_pages)
    copied = CounterMetricFamily(
        "albireo_kv_pages_copied", "KV pages copied between the devices and the host", labels=["direction"]
    )
    copied.add_metric(["to_host"], tiers.copied_out)
    copied.add_metric(["to_device"], tiers.copied_in)
    yield copied
    yield CounterMetricFamily(
        "albireo_kv_prefixes_lost",
        "Pages with a prefix that were given up, neither on the devices nor on the host any more",
        value=tiers.lost,
    )
    yield CounterMetricFamily(
        "albireo_prefix_query_tokens", "Prompt tokens of requests that started", value=cache.prompt_tokens
    )
    yield CounterMetricFamily(
        "albireo_prefix_hit_tokens", "Those of them that were in the cache", value=cache.cached_tokens
    )


def _request_families(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "albireo_prompt_tokens", "Prompt tokens of requests that got a token", value=snapshot.prompt_tokens
    )
    yield CounterMetricFamily(
        "albireo_generation_tokens", "Tokens generated", value=snapshot.generated_tokens
    )
    finished = CounterMetricFamily("albireo_requests_finished", "Requests that ended", labels=["reason"])
    for reason, count in snapshot.finished.items():
        finished.add_metric([reason.value], count)
    yield finished


def _latency_families(snapshot: MetricsSnapshot) -> Iterator[Metric]:
    yield _histogram("albireo_time_to_first_token_seconds", "Arrival to first token", snapshot.first_token_s)
    yield _histogram("albireo_inter_token_latency_seconds", "Token to token", snapshot.inter_token_s)
    yield _histogram("albireo_request_latency_seconds", "Arrival to last token", snapshot.request_s)
    yield _histogram(
        "albireo_request_queue_seconds", "Arrival to the first step of the request", snapshot.queue_s
    )
    yield _histogram(
        "albireo_request_prefill_seconds", "First step of the request to first token", snapshot.prefill_s
    )
    yield _histogram("albireo_request_decode_seconds", "First token to last token", snapshot.decode_s)


def _histogram(name: str, documentation: str, snapshot: HistogramSnapshot) -> Metric:
    return HistogramMetricFamily(
        name, documentation, buckets=histogram_buckets(snapshot), sum_value=snapshot.sum
    )


def _sampling_families(routes: Mapping[str, RouteTotals]) -> Iterator[Metric]:
    steps = CounterMetricFamily(
        "albireo_sampling_steps", "Steps by the route that sampled their rows", labels=["route"]
    )
    moved = CounterMetricFamily(
        "albireo_sampling_wire_bytes",
        "Bytes that each rank received to sample them; fallbacks of candidates are not included",
        labels=["route"],
    )
    for route, totals in routes.items():
        steps.add_metric([route], totals.steps)
        moved.add_metric([route], totals.wire_bytes)
    yield steps
    yield moved


def _task_families(table: TaskTable) -> Iterator[Metric]:
    """The task table; gauges, since it covers a window that moves on."""
    yield GaugeMetricFamily("albireo_task_window_steps", "Steps in the task table", value=table.steps)
    yield GaugeMetricFamily("albireo_task_window_seconds", "Wall time of these steps", value=table.wall_s)
    spent = GaugeMetricFamily(
        "albireo_task_seconds", "Time of each task over these steps", labels=["task", "name"]
    )
    exposed = GaugeMetricFamily(
        "albireo_task_exposed_seconds",
        "The part of it in which the device had nothing queued",
        labels=["task", "name"],
    )
    for task in table.tasks:
        number, _, name = task.name.partition(" ")
        spent.add_metric([number, name], task.total_s)
        exposed.add_metric([number, name], task.exposed_s)
    yield spent
    yield exposed
    yield GaugeMetricFamily(
        "albireo_kv_copy_window_seconds",
        "Time that the copies of KV pages of these steps take by themselves",
        value=table.copies.total_s,
    )
    yield GaugeMetricFamily(
        "albireo_kv_copy_exposed_seconds",
        "The part of these steps in which the device computed nothing for them",
        value=table.copies.exposed_s,
    )


def _energy_families(reading: EnergyReading, *, output_tokens: int) -> Iterator[Metric]:
    """Nothing where no counter can be read: 0 would be a lie."""
    if reading.joules is None:
        return
    yield CounterMetricFamily(
        "albireo_energy_joules",
        "Energy that the engine's devices took since it was launched, idle or not",
        value=reading.joules,
    )
    if output_tokens:
        yield GaugeMetricFamily(
            "albireo_energy_joules_per_output_token",
            "All of that energy over all tokens generated",
            value=reading.joules / output_tokens,
        )
