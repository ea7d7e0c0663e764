"""The marker `compiles` is set for what imports JAX, and for that alone."""

import pytest

from tests.house.source_files import ROOT
from tests.labs.jax_imports import loads_jax


def test_imports_are_followed_through_the_project() -> None:
    assert loads_jax(ROOT / "tests" / "labs" / "attention_lab.py")
    assert loads_jax(ROOT / "tests" / "runtime" / "test_engine.py")
    assert loads_jax(ROOT / "tests" / "nn" / "test_decoder.py")


def test_imports_inside_of_functions_do_not_count() -> None:
    wishes = ROOT / "tests" / "labs" / "wish_lab.py"
    assert "LLM(" in wishes.read_text()
    assert not loads_jax(wishes)
    assert not loads_jax(ROOT / "tests" / "labs" / "engine_lab.py")


def test_this_test_has_no_marker(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("compiles") is None
