"""Marks the tests that may compile programs, which `make check` leaves out, and has others fail that do.

A test has the marker `compiles` if its module, or that of one of its fixtures, imports JAX when it is
imported. A test that reaches JAX later, through `LLM` or a process that it starts, says so with the marker.
"""

from collections.abc import Generator
from pathlib import Path
from types import FunctionType

import jax
import pytest

from tests.labs.jax_imports import ROOT, loads_jax

TESTS = ROOT / "tests"
MARKER = "compiles"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_COMPILED = pytest.StashKey[list[str]]()
_READ_BY_JAX = "JAX_PLATFORMS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what may compile a program."""
    for item in items:
        if any(loads_jax(path) for path in _modules(item)):
            item.add_marker(MARKER)


def pytest_configure(config: pytest.Config) -> None:
    """Count the programs that XLA compiles."""
    compiled = config.stash[_COMPILED] = list[str]()

    def count(event: str, _: float, **__: str | int) -> None:
        if event == _COMPILE_EVENT:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have a process that a test without the marker starts fail when it would compile on JAX's own choice."""
    item.config.stash[_COMPILED].clear()  # modules that were collected may have compiled some
    if item.get_closest_marker(MARKER) is not None:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_READ_BY_JAX, f"none-in-a-test-without-the-marker-{MARKER}")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Have a test without the marker fail if it compiled a program, or its fixtures did."""
    result = yield
    compiled = item.config.stash[_COMPILED]
    number = len(compiled)
    compiled.clear()
    if number and item.get_closest_marker(MARKER) is None:
        pytest.fail(f"{number} programs were compiled by a test without the marker `{MARKER}`", pytrace=False)
    return result


def _modules(item: pytest.Item) -> set[Path]:
    """Files of a test and of its fixtures, of which the one of all tests is left out: it imports JAX."""
    assert isinstance(item, pytest.Function)
    fixtures = {
        Path(definition.func.__code__.co_filename)
        for definitions in item._fixtureinfo.name2fixturedefs.values()
        for definition in definitions
        if isinstance(definition.func, FunctionType)
    }
    return {item.path} | {path for path in fixtures if TESTS in path.parents and path.parent != TESTS}
