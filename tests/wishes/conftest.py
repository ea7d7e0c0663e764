"""Lets the tests of this folder share the model and the servers of `wish_lab`."""

from collections.abc import Iterator

import pytest

from tests.labs.wish_lab import Paths, open_paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """One engine of a tiny random model, and every way to ask it."""
    with open_paths(tmp_path_factory.mktemp("model")) as opened:
        yield opened
