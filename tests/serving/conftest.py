"""Lets the tests of this folder share the simulated engine and its server."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_lab import Lab, lab
from http_lab import served

from albireo_jax.serving.app import create_app


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
