"""Metrics under vLLM's names say what those of ours say, to the parsers of Prometheus and of OpenMetrics."""

import asyncio
from collections.abc import Iterable

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import SamplingParams
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process
from tests.labs.metrics_lab import scraped

SAME = {
    "vllm:num_requests_running": "albireo_requests_running",
    "vllm:num_requests_waiting": "albireo_requests_waiting",
    "vllm:num_preemptions": "albireo_preemptions",
    "vllm:prefix_cache_queries": "albireo_prefix_query_tokens",
    "vllm:prefix_cache_hits": "albireo_prefix_hit_tokens",
    "vllm:prompt_tokens": "albireo_prompt_tokens",
    "vllm:generation_tokens": "albireo_generation_tokens",
    "vllm:request_success": "albireo_requests_finished",
    "vllm:time_to_first_token_seconds": "albireo_time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "albireo_inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds": "albireo_request_latency_seconds",
    "vllm:request_queue_time_seconds": "albireo_request_queue_seconds",
    "vllm:request_prefill_time_seconds": "albireo_request_prefill_seconds",
    "vllm:request_decode_time_seconds": "albireo_request_decode_seconds",
}
OWN = {"vllm:kv_cache_usage_perc", "vllm:cache_config_info"}
SMALL = EngineLimits(max_model_len=128, vocab_size=101, num_pages=10, page_size=8)
BODY = {"prompt": "x" * 20, "max_tokens": 30, "ignore_eos": True}


def families(metrics: Iterable[Metric]) -> dict[str, Metric]:
    return {family.name: family for family in metrics}


def samples(family: Metric) -> list[tuple[str, list[str], float]]:
    """The samples without the name of the family and the labels of the engine."""
    return [
        (
            sample.name.removeprefix(family.name),
            [value for label, value in sample.labels.items() if label not in ("model_name", "engine")],
            sample.value,
        )
        for sample in family.samples
    ]


def test_each_says_what_ours_says() -> None:
    with lab(SMALL) as engine:
        found = families(text_string_to_metric_families(scraped(engine, *[BODY] * 4).text))
    assert {name for name in found if name.startswith("vllm:")} == {*SAME, *OWN}
    for name, ours in SAME.items():
        assert samples(found[name]) == samples(found[ours]), name
        assert found[name].type == found[ours].type
        for sample in found[name].samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
    assert found["vllm:num_preemptions"].samples[0].value > 0
    assert {sample.labels["finished_reason"] for sample in found["vllm:request_success"].samples} > {
        "stop",
        "length",
    }


def test_the_use_of_the_cache_is_a_share_of_its_pages() -> None:
    async def main(engine: Lab) -> tuple[float, ...]:
        async with in_process(create_app(engine)) as client:
            stream = engine.frontend.stream_async(["x" * 20], SamplingParams(max_tokens=50, ignore_eos=True))
            async for _ in stream:
                break
            during = families(text_string_to_metric_families((await client.get("/metrics")).text))
            stream.close()
            names = ("vllm:kv_cache_usage_perc", "albireo_kv_pages_in_use", "albireo_kv_pages")
            return tuple(during[name].samples[0].value for name in names)

    with lab(SMALL) as engine:
        share, in_use, num_pages = asyncio.run(main(engine))
    assert share == in_use / num_pages
    assert 0 <= share <= 1


def test_the_cache_is_described_in_labels() -> None:
    with lab(SMALL) as engine:
        found = families(text_string_to_metric_families(scraped(engine).text))
    (sample,) = found["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "block_size": "8",
        "num_gpu_blocks": "10",
        "num_cpu_blocks": "0",
        "engine": "0",
    }


def test_queue_and_prefill_are_the_time_to_the_first_token_and_with_decode_that_to_the_last() -> None:
    with lab(max_rows=1) as engine:
        scraped(engine, *[BODY] * 4)
        figures = engine.frontend.metrics.snapshot()
    assert figures.queue_s.count == figures.prefill_s.count == figures.decode_s.count == 4
    first = figures.queue_s.sum + figures.prefill_s.sum
    assert first == pytest.approx(figures.first_token_s.sum)
    assert first + figures.decode_s.sum == pytest.approx(figures.request_s.sum)
    assert figures.queue_s.sum > 0, "one row serves four requests"


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text", "application/openmetrics-text; version=1.0.0"]
)
def test_openmetrics_is_given_to_whom_accepts_it(accept: str) -> None:
    with lab() as engine:
        answer = scraped(engine, BODY, accept=accept)
        plain = scraped(engine)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    found = families(openmetrics_parser.text_string_to_metric_families(answer.text))
    assert set(found) == set(families(text_string_to_metric_families(plain.text)))
    assert plain.headers["content-type"].startswith("text/plain; version=")
