"""Lets the tests of this folder share the model and the servers of `wish_lab`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
sys.path.insert(0, str(Path(__file__).parent))

from wish_lab import Paths, open_paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """One engine of a tiny random model, and every way to ask it."""
    with open_paths(tmp_path_factory.mktemp("model")) as opened:
        yield opened
