"""Lets the tests of this folder share the simulated engine and its server."""

from collections.abc import Iterator

import pytest

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import served


@pytest.fixture
def engine() -> Iterator[Lab]:
    """A simulated engine."""
    with lab() as running:
        yield running


@pytest.fixture
def url(engine: Lab) -> Iterator[str]:
    """URL of a server of `engine`."""
    with served(create_app(engine)) as address:
        yield address
