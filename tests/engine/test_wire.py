"""What is written is read again; whatever else arrives stops neither end of the wire."""

import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from albireo_jax.core.errors import Refusal
from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.plan import LogprobArrays
from albireo_jax.core.types import FinishReason, Request, RequestLogprobs, RequestOutput
from albireo_jax.engine import wire
from albireo_jax.engine.engine_server import EngineServer
from albireo_jax.engine.remote_engine import RemoteEngine
from albireo_jax.engine.service import EngineService
from tests.labs.engine_lab import LIMITS, sim_loop
from tests.labs.service_lab import BOUND_S, Collector, bound_by, no_figures, plain_request

RULES = LogitRules(logit_bias=((3, 1.5),), allowed_token_ids=(1, 2, 3), bad_words=((4, 5), (6,)))
STATS = sim_loop().scheduler.stats()


def _logprobs(count: int) -> LogprobArrays:
    draw = np.random.default_rng(count)
    return LogprobArrays(
        logprobs=draw.random(count, np.float32),
        ranks=np.arange(count, dtype=np.int32),
        top_ids=np.arange(3 * count, dtype=np.int32).reshape(count, 3),
        top_logprobs=draw.random((count, 3), np.float32),
    )


def test_requests_are_read_as_they_were_and_share_their_prompts() -> None:
    one = replace(plain_request("one", prompt_len=500), rules=RULES, structured=bound_by("x"))
    other = replace(one, request_id="other", sampling=one.sampling.with_seed(7))
    data = wire.encode(wire.Submit(5, [(1, one), (2, other)]))
    assert len(data) < 2 * len(wire.encode(wire.Submit(5, [(1, one)])))
    message = wire.ClientMessageDecoder().decode(data)
    assert isinstance(message, wire.Submit)
    assert message.requests == [(1, one), (2, other)]
    prompts = [request.prompt_token_ids for _, request in message.requests]
    assert prompts[0] is prompts[1]


def test_a_step_is_read_as_it_was() -> None:
    scores = RequestLogprobs(_logprobs(1), (_logprobs(4), _logprobs(2)))
    outputs = [
        RequestOutput("a", 5, None),
        RequestOutput("b", 0, FinishReason.STOP, is_text=False),
        RequestOutput("c", None, FinishReason.ABORT),
        RequestOutput("d", 7, FinishReason.LENGTH, scores, cached_tokens=32, started_s=1.25),
        RequestOutput("e", None, FinishReason.ERROR, refusal=Refusal("wrong", is_overload=True)),
        RequestOutput("a", 6, None),
    ]
    handles = {"a": 2**40, "b": 0, "c": 3, "d": 4, "e": 5}
    sent = [wire.SentOutput(handles[output.request_id], output) for output in outputs]
    step = wire.EngineMessageDecoder().decode(wire.encode(wire.pack_step(sent, session=9, stats=STATS)))
    assert isinstance(step, wire.Step)
    assert (step.session, step.stats) == (9, STATS)
    names = {handle: name for name, handle in handles.items()}
    read = wire.unpack_step(step, names)
    assert [output._replace(scores=None) for output in read] == [
        output._replace(scores=None) for output in outputs
    ]
    given = read[3].scores
    assert given is not None
    for mine, theirs in zip(
        (given.token, *(given.prompt or ())), (scores.token, *(scores.prompt or ())), strict=True
    ):
        assert np.array_equal(mine.top_logprobs, theirs.top_logprobs)
        assert np.array_equal(mine.logprobs, theirs.logprobs)
    del names[0]
    assert [output.request_id for output in wire.unpack_step(step, names)] == ["a", "c", "d", "e", "a"]


def _garbage(rng: random.Random) -> Iterator[bytes]:
    """Random bytes, cut and changed messages, values of wrong types, unknown messages."""
    whole = [
        wire.encode(wire.Submit(1, [(1, plain_request("x"))])),
        wire.encode(wire.AbortHandles([1, 2])),
        wire.encode(wire.AskFirstMask(1, bound_by("x"))),
        wire.encode(wire.pack_step([wire.SentOutput(1, RequestOutput("", 5, None))], session=1, stats=STATS)),
    ]
    for _ in range(300):
        data = rng.choice(whole)
        yield rng.randbytes(rng.randrange(60))
        yield data[: rng.randrange(len(data))]
        changed = bytearray(data)
        changed[rng.randrange(len(data))] = rng.randrange(256)
        yield bytes(changed)
    for value in (
        {},
        [],
        None,
        5,
        "submit",
        {"type": "nothing"},
        {"type": "submit", "session": "x", "requests": []},
    ):
        yield msgspec.msgpack.encode(value)
    for prompt in (b"", b"abc", 7, -1, [[2], b"12345678"], [[-1, -1], b"1234"]):
        fields = {"request_id": "r", "prompt_token_ids": prompt, "max_tokens": 4}
        yield msgspec.msgpack.encode({"type": "submit", "session": 1, "requests": [(1, fields)]})
    yield b"\xdd\xff\xff\xff\xff"  # an array of four thousand million parts, of which none follows
    yield b"\x91" * 100_000
    yield rng.randbytes(2**22)


@contextmanager
def _server(folder: Path) -> Generator[str]:
    service = EngineService(sim_loop(), LIMITS)
    server = EngineServer(f"ipc://{folder}/engine")
    server.serve(service, eos_token_ids=(), figures=no_figures)
    try:
        yield f"ipc://{folder}/engine"
    finally:
        service.stop()
        server.close()


@pytest.mark.parametrize("greets", [True, False])
def test_no_message_stops_the_engine(tmp_path: Path, greets: bool) -> None:
    with _server(tmp_path) as address, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(address)
        if greets:
            stranger.send(wire.encode(wire.Hello()))
        for data in _garbage(random.Random(1)):
            stranger.send_multipart([data] if len(data) % 3 else [data, data])
        stranger.send(wire.encode(wire.Goodbye()))
        _assert_serves(address)


def _assert_serves(address: str) -> None:
    client, collector = RemoteEngine(address), Collector()
    try:
        assert client.wait_welcome(BOUND_S)
        client.start(collector.deliver)
        client.submit(plain_request("good"))
        collector.wait_for_end(1)
        assert collector.ends() == {"good": FinishReason.LENGTH}
    finally:
        client.stop()


def test_no_message_stops_a_front_end(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as fake:
        fake.setsockopt(zmq.LINGER, 0)
        fake.bind(address)
        client, collector = RemoteEngine(address), Collector()
        try:
            identity, hello = fake.recv_multipart()
            assert hello == wire.encode(wire.Hello())
            welcome = wire.Welcome(5, LIMITS, (), EngineService(sim_loop(), LIMITS).state, STATS)
            for data in _garbage(random.Random(2)):
                fake.send_multipart((identity, data))
            fake.send_multipart((identity, wire.encode(welcome)))
            assert client.wait_welcome(BOUND_S)
            client.start(collector.deliver)
            client.submit(plain_request("asked"))
            message = wire.ClientMessageDecoder().decode(fake.recv_multipart()[1])
            assert isinstance(message, wire.Submit)
            ((handle, request),) = message.requests
            assert isinstance(request, Request)
            for data in _garbage(random.Random(3)):
                fake.send_multipart((identity, data))
            end = wire.SentOutput(handle, RequestOutput("", 3, FinishReason.LENGTH))
            fake.send_multipart((identity, wire.encode(wire.pack_step([end], session=5, stats=STATS))))
            collector.wait_for_end(1)
            assert collector.ends() == {"asked": FinishReason.LENGTH}
        finally:
            client.stop()


def test_a_message_beyond_the_limit_ends_its_connection_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 2**16)
    with _server(tmp_path) as address, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(address)
        stranger.send(bytes(2**20))
        _assert_serves(address)
