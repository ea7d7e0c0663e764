"""The engine thread ends every request that it accepted exactly once, whatever happens to it."""

import random
import threading
from collections import Counter
from dataclasses import replace

import pytest

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.plan import Executor, SampledTokens, StepHandle, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.engine.service import MAX_MESSAGES, EngineService, ServiceState
from tests.labs.engine_lab import LIMITS, sim_loop, tokens_alone
from tests.labs.service_lab import Collector, Start, Transports, plain_request, wait_for_state

LONG = 1500


def test_many_threads_get_the_tokens_they_get_alone(start: Start) -> None:
    service, collector = start(max_rows=8)
    requests = [
        plain_request(f"{i:0{1 + i % 5}}", max_tokens=1 + i % 20, prompt_len=1 + i % 40) for i in range(60)
    ]
    threads = [
        threading.Thread(
            target=lambda part: [service.submit(request) for request in part], args=(requests[i::6],)
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.drain(60)
    service.stop()
    assert collector.ends() == {request.request_id: FinishReason.LENGTH for request in requests}
    alone = tokens_alone(requests)
    assert {request_id: collector.tokens(request_id) for request_id in alone} == alone
    assert service.stats().pages_in_use == 0


def test_prefixes_are_forgotten_in_the_order_of_the_calls(start: Start) -> None:
    service, collector = start()
    calls = ("first", "same", "forget", "behind", "again", "forget", "forget", "last")
    service.forget_prefixes()
    for i, call in enumerate(calls):
        if call == "forget":
            service.forget_prefixes()
        else:
            request = plain_request("prompt", prompt_len=40)
            sampling = request.sampling.with_seed(i)
            service.submit(replace(request, request_id=call, sampling=sampling))
            collector.wait_for_end(1)
    cached = {output.request_id: 0 for output in collector.outputs}
    for output in collector.outputs:
        cached[output.request_id] += output.cached_tokens
    assert cached == {"first": 0, "same": 32, "behind": 0, "again": 32, "last": 0}
    service.stop()
    service.forget_prefixes()


def test_a_request_that_runs_while_prefixes_are_forgotten_leaves_none(start: Start) -> None:
    service, collector = start()
    service.submit(replace(plain_request("old", prompt_len=40), max_tokens=300))
    service.forget_prefixes()
    service.submit(replace(plain_request("old", prompt_len=40), request_id="new"))
    assert service.drain(60)
    assert set(collector.ends()) == {"old", "new"}
    assert sum(output.cached_tokens for output in collector.outputs) == 0
    service.stop()


def test_random_aborts_leave_nothing_behind(start: Start) -> None:
    rng = random.Random(1)
    service, collector = start(max_rows=8)
    for i in range(200):
        service.submit(plain_request(f"a{i}", max_tokens=rng.choice((1, 3, LONG))))
        service.abort(f"a{rng.randrange(i + 1)}")
    for i in range(200):
        service.abort(f"a{i}")
    assert service.drain(60)
    ends = collector.ends()
    assert set(ends) == {f"a{i}" for i in range(200)}
    assert set(ends.values()) <= {FinishReason.ABORT, FinishReason.LENGTH}
    stats = service.stats()
    assert (stats.pages_in_use, stats.waiting, stats.running) == (0, 0, 0)
    service.stop()


def test_an_idle_engine_does_not_step() -> None:
    calls = Counter[str]()

    def clock() -> float:
        calls["clock"] += 1  # the loop and the service read it at every step
        return 0.0

    collector = Collector()
    service = EngineService(sim_loop(clock=clock), LIMITS)
    service.start(collector.deliver)
    service.submit(plain_request("one"))
    service.stop()
    before = calls["clock"]
    assert before > 0

    service = EngineService(sim_loop(clock=clock), LIMITS)
    service.start(collector.deliver)
    assert sum(range(3_000_000)) > 0  # gives a thread that spins time to be caught
    assert calls["clock"] == before
    service.stop()


def test_stop_ends_what_is_open_and_refuses_the_rest(start: Start) -> None:
    service, collector = start()
    service.submit(*(plain_request(f"s{i}", max_tokens=LONG) for i in range(30)))
    service.stop()
    assert collector.ends() == {f"s{i}": FinishReason.ABORT for i in range(30)}
    assert service.state is ServiceState.STOPPED
    assert service.stats().pages_in_use == 0
    with pytest.raises(EngineDeadError, match="stopped"):
        service.submit(plain_request("late"))
    service.abort("late")
    service.stop()
    with pytest.raises(RuntimeError, match="starts once"):
        service.start(collector.deliver)


def test_a_service_that_never_started_stops(transports: Transports) -> None:
    service = transports.connect(EngineService(sim_loop(), LIMITS))
    with pytest.raises(EngineDeadError, match="new"):
        service.submit(plain_request("early"))
    service.stop()
    assert service.state is ServiceState.STOPPED


@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_a_loop_that_raises_ends_every_request_with_an_error(
    fail_at: int, start: Start, transports: Transports
) -> None:
    service, collector = start(fail_at=fail_at)
    requests = [plain_request(f"e{i}", max_tokens=LONG) for i in range(20)]
    accepted = []
    for request in requests:
        try:
            service.submit(request)
        except EngineDeadError:
            break
        accepted.append(request.request_id)
    collector.wait_for_end(len(accepted))
    assert collector.ends() == dict.fromkeys(accepted, FinishReason.ERROR)
    with pytest.raises(EngineDeadError, match="stopped on an internal error") as caught:
        service.submit(plain_request("late"))
    told = EngineDeadError if transports.is_remote else RuntimeError
    assert isinstance(caught.value.__cause__, told)
    with pytest.raises(EngineDeadError):
        service.drain(60)
    with pytest.raises(EngineDeadError):
        service.check_running()
    service.stop()
    assert service.state is ServiceState.DEAD


class _Panic(BaseException):
    """A panic of an extension module as Python sees it: a BaseException that is no Exception."""


class _Raising:
    """An executor that raises at a step: as it dispatches, or as its result is waited for."""

    def __init__(self, inner: Executor, error: BaseException, *, in_wait: bool) -> None:
        self._inner = inner
        self._error = error
        self._in_wait = in_wait

    def dispatch(self, plan: StepPlan) -> StepHandle:
        handle = self._inner.dispatch(plan)
        if plan.step < 5:
            return handle
        if self._in_wait:
            return self
        raise self._error

    def wait(self) -> SampledTokens:
        raise self._error


@pytest.mark.parametrize("place", ["dispatch", "wait", "plan", "check_idle", "deliver"])
@pytest.mark.parametrize("kind", [RuntimeError, _Panic, SystemExit, KeyboardInterrupt, MemoryError])
def test_any_end_of_the_engine_thread_ends_every_request(
    kind: type[BaseException], place: str, monkeypatch: pytest.MonkeyPatch, transports: Transports
) -> None:
    error = kind("secret of another caller")

    def fail(*_: object) -> None:
        raise error

    in_executor = place in ("dispatch", "wait")
    loop = sim_loop(
        wrap=(lambda inner: _Raising(inner, error, in_wait=place == "wait")) if in_executor else None
    )
    service, collector = transports.connect(EngineService(loop, LIMITS)), Collector()
    deliver_step = collector.deliver

    def deliver(outputs: list[RequestOutput]) -> None:
        if place == "deliver" and service.state is ServiceState.RUNNING:
            fail()
        deliver_step(outputs)

    service.start(deliver)
    if place in ("plan", "check_idle"):
        service.submit(plain_request("first", max_tokens=1))
        collector.wait_for_end(1)
        assert service.drain(60)
        monkeypatch.setattr(loop.scheduler, place, fail)
    requests = [plain_request(f"e{i}", max_tokens=LONG if place != "check_idle" else 3) for i in range(20)]
    service.submit(*requests)
    collector.wait_for_end(len(requests))
    wait_for_state(service, ServiceState.DEAD)
    cause = service.failure
    assert (cause is error) == (place == "deliver" or not transports.is_remote)
    if place != "check_idle":
        reasons = [collector.ends()[request.request_id] for request in requests]
        assert reasons == [FinishReason.ERROR] * len(requests)
    for refused in (service.check_running, lambda: service.submit(plain_request("late")), service.drain):
        with pytest.raises(EngineDeadError) as caught:
            refused()
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is cause
    service.stop()


def test_a_request_that_cannot_be_added_ends_alone(
    monkeypatch: pytest.MonkeyPatch, transports: Transports
) -> None:
    loop, bad = sim_loop(), plain_request("bad")
    add = loop.scheduler.add

    def add_all_but_one(request: Request, constraint: None) -> RequestOutput | None:
        ended = add(request, constraint)
        if request.sampling == bad.sampling:
            raise TypeError("no such request was foreseen")
        return ended

    monkeypatch.setattr(loop.scheduler, "add", add_all_but_one)
    service, collector = transports.connect(EngineService(loop, LIMITS)), Collector()
    service.start(collector.deliver)
    service.submit(plain_request("good"), bad, plain_request("other"))
    collector.wait_for_end(3)
    assert service.drain(60)
    assert collector.ends() == {
        "good": FinishReason.LENGTH,
        "bad": FinishReason.ERROR,
        "other": FinishReason.LENGTH,
    }
    service.stop()
    assert service.state is ServiceState.STOPPED
    assert service.stats().pages_in_use == 0


def test_many_requests_at_once_are_added_a_part_before_each_step(transports: Transports) -> None:
    seen: list[int] = []
    loop = sim_loop()
    step = loop.step

    def counting_step() -> list[RequestOutput]:
        stats = loop.scheduler.stats()
        seen.append(stats.waiting + stats.running + stats.finishing)
        return step()

    loop.step = counting_step  # type: ignore[method-assign]
    service, collector = transports.connect(EngineService(loop, LIMITS)), Collector()
    service.start(collector.deliver)
    requests = [plain_request(f"m{i}", max_tokens=1) for i in range(3 * MAX_MESSAGES)]
    service.submit(*requests)
    service.abort(*(request.request_id for request in requests[::2]))
    assert service.drain(60)
    service.stop()
    assert seen[0] <= MAX_MESSAGES
    assert set(collector.ends()) == {request.request_id for request in requests}


def test_a_group_is_taken_whole_or_not_at_all(start: Start) -> None:
    service, collector = start()
    too_long = plain_request("big", max_tokens=LIMITS.max_model_len)
    with pytest.raises(ValueError, match=r"exceed the model's limit of 2048"):
        service.submit(plain_request("small"), too_long)
    with pytest.raises(ValueError, match="in use"):
        service.submit(plain_request("twin"), plain_request("twin"))
    service.submit(plain_request("small", max_tokens=LONG))
    with pytest.raises(ValueError, match="in use"):
        service.submit(plain_request("small"))
    service.abort("small")
    assert service.drain(60)
    assert set(collector.ends()) == {"small"}
    service.stop()


def test_drain_tells_when_requests_are_still_open(start: Start) -> None:
    service, _ = start()
    service.submit(*(plain_request(f"d{i}", max_tokens=LONG) for i in range(40)))
    assert not service.drain(0)
    service.stop()
    assert service.drain(0)
