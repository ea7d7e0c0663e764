"""Requests, collectors and constraints by name, for tests of the service."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from queue import SimpleQueue

from albireo_jax.core.plan import Int32s, TokenConstraint
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import FinishReason, Request, RequestOutput, StructuredOutput, StructureKind
from albireo_jax.engine.energy import EnergyReading
from albireo_jax.engine.engine_client import EngineClient, EngineFigures
from albireo_jax.engine.engine_server import EngineServer
from albireo_jax.engine.remote_engine import RemoteEngine
from albireo_jax.engine.service import EngineService, ServiceState
from albireo_jax.engine.timeline import Timeline
from tests.labs.engine_lab import Lab

BOUND_S = 30.0
LONG = 1500


def plain_request(request_id: str, *, max_tokens: int = 8, prompt_len: int = 5) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple((len(request_id) * 7 + i) % 90 for i in range(prompt_len)),
        max_tokens=max_tokens,
        sampling=TokenSampling(temperature=1.0, seed=sum(map(ord, request_id))),
    )


class Collector:
    """Keeps all outputs; `wait_for_end` blocks until a number of requests have ended."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._ended: SimpleQueue[str] = SimpleQueue()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self.outputs += outputs
        for output in outputs:
            if output.finish_reason is not None:
                self._ended.put(output.request_id)

    def wait_for_end(self, count: int) -> None:
        for _ in range(count):
            self._ended.get(timeout=60)

    def ends(self) -> dict[str, FinishReason]:
        ended = [output for output in self.outputs if output.finish_reason is not None]
        assert len({output.request_id for output in ended}) == len(ended), "a request ended twice"
        return {output.request_id: output.finish_reason for output in ended if output.finish_reason}

    def tokens(self, request_id: str) -> list[int]:
        return [
            output.token_id
            for output in self.outputs
            if output.request_id == request_id and output.token_id is not None
        ]


def bound_by(name: str) -> StructuredOutput:
    """The specification of the constraint of a name."""
    return StructuredOutput(kind=StructureKind.GRAMMAR, text=name)


class NamedConstraints:
    """A compiler that gives constraints, or raises errors, by name; it begins when it is `opened`."""

    def __init__(self, **constraints: TokenConstraint | BaseException) -> None:
        self._constraints = constraints
        self.opened = threading.Event()
        self.opened.set()

    def find(self, structured: StructuredOutput) -> None:
        """Nothing is kept."""

    def compile(self, structured: StructuredOutput) -> "_Named":
        assert self.opened.wait(BOUND_S)
        made = self._constraints[structured.text]
        if isinstance(made, BaseException):
            raise made
        return _Named(made)


class _Named:
    def __init__(self, constraint: TokenConstraint) -> None:
        self._constraint = constraint

    def constraint(self, *, ignore_eos: bool = False) -> TokenConstraint:
        return self._constraint

    def first_mask(self) -> Int32s:
        return self._constraint.mask()


Build = Callable[..., AbstractContextManager[Lab]]
"""Builds a simulated engine with its frontend, as `engine_lab.lab`."""

Start = Callable[..., tuple[EngineClient, Collector]]
"""Starts a simulated engine and gives its client, and the collector of its outputs."""


class Transports:
    """Connects clients to services, each in this process or over a socket in a folder; closes them all."""

    def __init__(self, folder: Path, *, is_remote: bool) -> None:
        self.is_remote = is_remote
        self._folder = folder
        self._stack = ExitStack()
        self._num_servers = 0

    def connect(self, service: EngineService) -> EngineClient:
        """A client of `service`, not started; the service itself is one."""
        self._stack.callback(service.stop)
        if not self.is_remote:
            return service
        address = f"ipc://{self._folder}/{self._num_servers}"
        self._num_servers += 1
        server = EngineServer(address)
        self._stack.callback(server.close)
        server.serve(service, eos_token_ids=(), figures=no_figures)
        client = RemoteEngine(address)
        self._stack.callback(client.stop)
        assert client.wait_welcome(BOUND_S)
        return client

    def close(self) -> None:
        """Stop everything, those that were made last first."""
        self._stack.close()


def no_figures() -> EngineFigures:
    """The figures of an engine that did nothing."""
    timeline = Timeline()
    return EngineFigures(
        table=timeline.table(),
        routes=timeline.routes(),
        energy=EnergyReading(joules=None, reason="simulated"),
    )


def wait_for_state(client: EngineClient, state: ServiceState) -> None:
    """Wait until a client is told of a state."""
    end_s = time.monotonic() + BOUND_S
    while client.state is not state:
        assert time.monotonic() < end_s, f"still {client.state}"
        time.sleep(0.001)
