"""An engine that ends, comes back or loses a front end; a front end that vanishes; totals of several."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from albireo_jax.core.errors import EngineDeadError, EngineStartingError
from albireo_jax.core.types import FinishReason, Request, SamplingParams
from albireo_jax.engine import wire
from albireo_jax.engine.engine_server import EngineServer
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.remote_engine import RemoteEngine
from albireo_jax.engine.service import EngineService, ServiceState
from tests.labs.engine_lab import LIMITS, sim_loop, tiny_tokenizer
from tests.labs.service_lab import BOUND_S, LONG, Collector, no_figures, plain_request, wait_for_state

LONG_REQUEST = plain_request("long", max_tokens=LONG)


def _wait(until: Callable[[], bool]) -> None:
    end_s = time.monotonic() + BOUND_S
    while not until():
        assert time.monotonic() < end_s
        time.sleep(0.002)


class _Engines:
    """Engines at one address, one after the other, and clients of them."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/engine"
        self._stack = ExitStack()

    def listen(self) -> EngineServer:
        server = EngineServer(self.address)
        self._stack.callback(server.close)
        return server

    def serve(self, server: EngineServer | None = None, limits=LIMITS) -> tuple[EngineService, EngineServer]:
        service, server = EngineService(sim_loop(limits), limits), server or self.listen()
        self._stack.callback(service.stop)
        server.serve(service, eos_token_ids=(1,), figures=no_figures)
        return service, server

    def client(self) -> RemoteEngine:
        client = RemoteEngine(self.address)
        self._stack.callback(client.stop)
        return client

    def started(self) -> tuple[RemoteEngine, Collector]:
        client, collector = self.client(), Collector()
        assert client.wait_welcome(BOUND_S)
        client.start(collector.deliver)
        return client, collector

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def engines(tmp_path: Path):
    made = _Engines(tmp_path)
    yield made
    made.close()


def _answered(client: RemoteEngine, collector: Collector, request: Request) -> FinishReason:
    client.submit(request)
    collector.wait_for_end(1)
    return collector.ends()[request.request_id]


def test_an_engine_that_ends_ends_all_requests_and_the_next_one_serves(engines: _Engines) -> None:
    _, server = engines.serve()
    client, collector = engines.started()
    client.submit(*(replace(LONG_REQUEST, request_id=f"r{i}") for i in range(5)))
    _wait(lambda: bool(collector.outputs))
    server.close()
    begin_s = time.monotonic()
    collector.wait_for_end(5)
    assert time.monotonic() - begin_s < 1
    assert set(collector.ends().values()) == {FinishReason.ERROR}
    assert client.state is ServiceState.DEAD
    assert not client.is_over
    with pytest.raises(EngineDeadError, match="stopped on an internal error"):
        client.submit(plain_request("refused"))
    with pytest.raises(EngineDeadError):
        client.drain(BOUND_S)

    server = engines.listen()
    server.tell_loading("compiling steps", done=3, total=7)
    wait_for_state(client, ServiceState.STARTING)
    _wait(lambda: client.loading.done == 3)
    with pytest.raises(EngineStartingError, match="compiling steps: 3 of 7"):
        client.submit(plain_request("early"))
    engines.serve(server)
    wait_for_state(client, ServiceState.RUNNING)
    assert _answered(client, collector, plain_request("late")) is FinishReason.LENGTH
    assert client.stats().pages_in_use == 0


def test_questions_to_an_engine_that_ends_are_answered_with_an_error(engines: _Engines) -> None:
    server = EngineServer(engines.address)
    service = EngineService(sim_loop(), LIMITS)

    def never() -> None:
        time.sleep(0.5)
        raise LookupError("no figures")

    server.serve(service, eos_token_ids=(), figures=never)  # type: ignore[arg-type]
    client, _ = engines.started()
    asked = client.figures()
    time.sleep(0.05)
    service.stop()
    server.close()
    with pytest.raises(Exception, match=r"stopped on an internal error|its log says why"):
        asked.result(BOUND_S)


def test_an_engine_with_other_limits_ends_the_front_end(engines: _Engines) -> None:
    _, server = engines.serve()
    client, _ = engines.started()
    server.close()
    engines.serve(limits=replace(LIMITS, num_pages=100))
    _wait(lambda: client.is_over)
    with pytest.raises(EngineDeadError) as caught:
        client.check_running()
    assert "other limits" in str(caught.value.__cause__)


def test_a_front_end_that_vanishes_leaves_nothing_behind(engines: _Engines) -> None:
    service, _ = engines.serve()
    with zmq.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(engines.address)
        socket.send(wire.encode(wire.Hello()))
        welcome = wire.EngineMessageDecoder().decode(socket.recv())
        assert isinstance(welcome, wire.Welcome)
        requests = [(i, replace(LONG_REQUEST, request_id=str(i), max_tokens=2000)) for i in range(40)]
        socket.send(wire.encode(wire.Submit(welcome.session, requests)))
        socket.recv()
        socket.close()
    assert service.drain(BOUND_S)
    assert service.stats().steps < 2000
    assert service.stats().pages_in_use == 0


def test_a_front_end_that_stops_leaves_the_engine_to_others(engines: _Engines) -> None:
    service, _ = engines.serve()
    one, collector = engines.started()
    other, others = engines.started()
    one.submit(LONG_REQUEST)
    other.submit(LONG_REQUEST)  # the same id, which is another request there
    one.stop()
    assert collector.ends() == {"long": FinishReason.ABORT}
    others.wait_for_end(1)
    assert others.ends() == {"long": FinishReason.LENGTH}
    assert service.state is ServiceState.RUNNING
    assert _answered(other, others, plain_request("next")) is FinishReason.LENGTH


def test_every_front_end_knows_the_totals_of_the_others(engines: _Engines) -> None:
    engines.serve()
    tokenizer = tiny_tokenizer()
    clients, frontends = [engines.client() for _ in range(3)], []
    for i, client in enumerate(clients):
        assert client.wait_welcome(BOUND_S)
        frontend = Frontend(client, tokenizer, limits=LIMITS, eos_token_ids=())
        client.share_metrics(frontend.metrics.snapshot)
        frontend.generate(["x"] * (i + 1), SamplingParams(max_tokens=10, ignore_eos=True))
        frontends.append(frontend)
    for i, client in enumerate(clients):
        expected = 10 * (6 - (i + 1))
        _wait(lambda: client.others is not None and client.others.generated_tokens == expected)  # noqa: B023
        assert client.others is not None
        assert client.others.finished[FinishReason.LENGTH] == 6 - (i + 1)
        assert client.others.first_token_s.count == 6 - (i + 1)
    frontends[2].close()
    frontends[1].generate(["x"], SamplingParams(max_tokens=10, ignore_eos=True))
    first = clients[0]
    _wait(lambda: first.others is not None and first.others.generated_tokens == 60)
