"""The tests of a service run over both of its transports."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.engine.constraint_compiler import Compiler
from albireo_jax.engine.engine_client import EngineClient
from albireo_jax.engine.service import EngineService
from tests.labs import engine_lab
from tests.labs.engine_lab import LIMITS, sim_loop
from tests.labs.service_lab import Build, Collector, Start, Transports


@pytest.fixture(params=["in process", "remote"])
def transports(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transports]:
    """Connects clients to services."""
    made = Transports(tmp_path, is_remote=request.param == "remote")
    yield made
    made.close()


@pytest.fixture
def start(transports: Transports) -> Start:
    """Starts a client of a simulated engine, its outputs collected."""

    def start(compiler: Compiler | None = None, **loop_options: Any) -> tuple[EngineClient, Collector]:
        service = EngineService(sim_loop(**loop_options), LIMITS, compiler=compiler)
        client, collector = transports.connect(service), Collector()
        client.start(collector.deliver)
        return client, collector

    return start


@pytest.fixture
def lab(transports: Transports) -> Build:
    """Builds whole simulated engines."""
    return partial(engine_lab.lab, connect=transports.connect)
