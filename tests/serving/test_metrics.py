"""/metrics is Prometheus text whose figures agree with what was served."""

import asyncio
from dataclasses import replace

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import NOT_FINITE, Executor, StepHandle, StepPlan
from albireo_jax.engine.energy import EnergyMeter
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process
from tests.labs.script_lab import Said

TASKS = ("T1", "T2", "T3", "T4", "T5")


async def _samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Values by name and label values."""
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class _TwoRoutes:
    """Samples by two routes in turn; the logits of step `broken_at` are not finite."""

    def __init__(self, inner: Executor, *, broken_at: int) -> None:
        self._inner = inner
        self._broken_at = broken_at

    def dispatch(self, plan: StepPlan) -> StepHandle:
        sampled = self._inner.dispatch(plan).wait()
        if plan.step == self._broken_at:
            sampled = replace(sampled, ids=np.full_like(sampled.ids, NOT_FINITE))
        odd = plan.step % 2
        return Said(replace(sampled, route=("greedy", "candidates")[odd], wire_bytes=(3, 1000)[odd]))


def _scrape(
    engine: Lab, *bodies: dict[str, object], status: int = httpx.codes.OK
) -> dict[tuple[str, ...], float]:
    async def main() -> dict[tuple[str, ...], float]:
        async with in_process(create_app(engine)) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            assert all(answer.status_code == status for answer in answers)
            return await _samples(client)

    return asyncio.run(main())


def test_an_engine_that_did_nothing_has_all_families_at_zero() -> None:
    with lab() as engine:
        samples = _scrape(engine)
    assert samples.pop(("albireo_kv_pages",)) == engine.limits.num_pages
    limits = engine.limits
    config = (str(limits.page_size), "0", str(limits.num_host_pages), str(limits.num_pages))
    assert samples.pop(("vllm:cache_config_info", *config)) == 1
    assert set(samples.values()) == {0}
    for task in TASKS:
        assert any(key[0] == "albireo_task_seconds" and task in key for key in samples)


def test_figures_agree_with_what_was_served() -> None:
    body = {"prompt": "abcd", "max_tokens": 10, "ignore_eos": True, "n": 2}
    with lab() as engine:
        samples = _scrape(engine, *[body] * 6)
    assert samples["albireo_generation_tokens_total",] == 120
    assert samples["albireo_prompt_tokens_total",] == 48
    assert samples["albireo_requests_finished_total", "length"] == 12
    assert samples["albireo_requests_finished_total", "stop"] == 0
    assert samples["albireo_time_to_first_token_seconds_count",] == 12
    assert samples["albireo_time_to_first_token_seconds_bucket", "+Inf"] == 12
    assert samples["albireo_inter_token_latency_seconds_count",] == 108
    assert samples["albireo_request_latency_seconds_count",] == 12
    assert samples["albireo_steps_total",] >= 10
    for name in ("requests_running", "requests_waiting", "kv_pages_in_use", "preemptions_total"):
        assert samples[f"albireo_{name}",] == 0


def test_the_task_table_is_there() -> None:
    with lab(depth=1) as engine:
        samples = _scrape(engine, {"prompt": "x", "max_tokens": 50, "ignore_eos": True})
        table = engine.timeline.table()
    assert samples["albireo_task_window_steps",] == table.steps
    spent = {key: value for key, value in samples.items() if key[0] == "albireo_task_seconds"}
    exposed = {key: value for key, value in samples.items() if key[0] == "albireo_task_exposed_seconds"}
    assert len(spent) == len(exposed) == len(TASKS)
    assert sorted(spent.values()) == sorted(task.total_s for task in table.tasks)
    assert sorted(exposed.values()) == sorted(task.exposed_s for task in table.tasks)
    assert max(spent.values()) > 0
    assert samples["albireo_kv_copy_window_seconds",] == table.copies.total_s
    assert samples["albireo_kv_copy_exposed_seconds",] == table.copies.exposed_s


def test_preemptions_are_counted() -> None:
    limits = EngineLimits(max_model_len=128, vocab_size=101, num_pages=10, page_size=8)
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    with lab(limits) as engine:
        samples = _scrape(engine, *[body] * 4)
    assert samples["albireo_preemptions_total",] > 0
    assert samples["albireo_requests_finished_total", "length"] == 4


def test_steps_and_bytes_are_counted_by_the_route_that_sampled() -> None:
    body = {"prompt": "x", "max_tokens": 9, "ignore_eos": True}
    with lab(depth=1, wrap=lambda inner: _TwoRoutes(inner, broken_at=-1)) as engine:
        samples = _scrape(engine, body)
    steps = {key[1]: value for key, value in samples.items() if key[0] == "albireo_sampling_steps_total"}
    assert sum(steps.values()) == samples["albireo_steps_total",] == 9
    assert steps == {"greedy": 5, "candidates": 4}
    assert samples["albireo_sampling_wire_bytes_total", "greedy"] == 5 * 3
    assert samples["albireo_sampling_wire_bytes_total", "candidates"] == 4 * 1000
    assert samples["albireo_nonfinite_rows_total",] == 0


def test_rows_that_are_not_finite_are_counted() -> None:
    with lab(wrap=lambda inner: _TwoRoutes(inner, broken_at=0)) as engine:
        samples = _scrape(engine, {"prompt": "x", "max_tokens": 9, "n": 2}, status=500)
    assert samples["albireo_nonfinite_rows_total",] == 2
    assert samples["albireo_requests_finished_total", "error"] == 2


def test_prefixes_are_counted_as_they_are_found_moved_and_lost() -> None:
    """Each prompt fills 3 of the 8 pages, and 2 of the 3 can be found; its answer needs a page of its own."""
    limits = EngineLimits(max_model_len=64, vocab_size=101, num_pages=8, page_size=8, num_host_pages=2)
    prompts = ["a", "a", "b", "c", "a", "c"]
    with lab(limits) as engine:
        scrapes = [
            _scrape(engine, {"prompt": letter * 24, "max_tokens": 8, "ignore_eos": True})
            for letter in prompts
        ]

    def figures(*name: str) -> list[float]:
        return [samples[name] for samples in scrapes]

    assert figures("albireo_prefix_query_tokens_total") == [24, 48, 72, 96, 120, 144]
    assert figures("albireo_prefix_hit_tokens_total") == [0, 16, 16, 16, 32, 48]
    assert figures("albireo_kv_pages_idle") == [3, 3, 6, 7, 7, 6]
    # The first c needs 2 idle pages, those of a's end; the next a finds one of them on the host.
    assert figures("albireo_kv_pages_copied_total", "to_host") == [0, 0, 0, 2, 4, 5]
    assert figures("albireo_kv_pages_copied_total", "to_device") == [0, 0, 0, 0, 1, 1]
    assert figures("albireo_kv_host_pages_in_use") == [0, 0, 0, 2, 2, 2]
    assert figures("albireo_kv_prefixes_lost_total") == [0, 0, 0, 0, 1, 2]
    assert set(figures("albireo_kv_pages_in_use")) == {0}
    assert set(figures("albireo_kv_pages")) == {8}
    assert set(figures("albireo_kv_host_pages")) == {2}


def test_requests_that_came_back_and_those_without_hits_are_counted_once() -> None:
    limits = EngineLimits(max_model_len=128, vocab_size=101, num_pages=10, page_size=8)
    bodies = [{"prompt": letter * 20, "max_tokens": 60, "ignore_eos": True} for letter in "wxyz"]
    with lab(limits) as engine:
        samples = _scrape(engine, *bodies)
    assert samples["albireo_preemptions_total",] > 0
    assert samples["albireo_prefix_query_tokens_total",] == samples["albireo_prompt_tokens_total",] == 80
    assert samples["albireo_prefix_hit_tokens_total",] == 0


class _Counter:
    """A driver whose one device takes 2.5 J between readings."""

    NVMLError = LookupError

    def __init__(self) -> None:
        self.millijoules = 77_000

    def nvmlInit(self) -> None:  # noqa: N802
        raise AssertionError("the meter is open")

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str, /) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int, /) -> int:  # noqa: N802
        self.millijoules += 2_500
        return self.millijoules


def test_energy_is_that_since_the_launch_and_per_token_of_all() -> None:
    with lab(energy=EnergyMeter(_Counter(), [0])) as engine:
        first = _scrape(engine)
        second = _scrape(engine, {"prompt": "x", "max_tokens": 10, "ignore_eos": True})
    assert first["albireo_energy_joules_total",] == 2.5
    assert ("albireo_energy_joules_per_output_token",) not in first
    assert second["albireo_energy_joules_total",] == 5
    assert second["albireo_energy_joules_per_output_token",] == 0.5


def test_without_a_counter_there_is_no_energy_rather_than_none_spent() -> None:
    with lab() as engine:
        samples = _scrape(engine, {"prompt": "x", "max_tokens": 3, "ignore_eos": True})
    assert not any("energy" in key[0] for key in samples)
