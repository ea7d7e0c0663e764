"""Eight virtual CPU devices for every test, strict array rules, and the real models where they are."""

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

# Read by XLA when its first backend starts: a hang of a collective fails in seconds instead of hours.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=60"
).strip()

from jaxtyping import install_import_hook

for _package in ("ops", "nn", "sampling", "runtime", "models"):
    install_import_hook(f"albireo_jax.{_package}", "beartype.beartype")

import jax
import pytest

# What folders of tests share; registered once, before any of them imports it.
pytest.register_assert_rewrite("tests.labs")
pytest_plugins = ("tests.labs.compile_marker",)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

_TESTS = str(Path(__file__).parent)
_MAPS = Path("/proc/self/maps")
_MAX_MAPS = 15_000


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Has no garbage collected in a test that times its thread: a collection looks at what all tests keep."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory_maps() -> Iterator[None]:
    """Lets go of the engines that tests keep for each other, when there are many of them.

    A compiled program is about a hundred memory maps, of which Linux allows a process 65,530; XLA crashes
    where it gets no more.
    """
    yield
    if not _MAPS.exists() or _MAPS.read_bytes().count(b"\n") < _MAX_MAPS:
        return
    gc.unfreeze()  # an engine that is launched freezes what is there, and frozen objects are not listed
    for kept in gc.get_objects():
        if isinstance(kept, functools._lru_cache_wrapper):
            code = kept.__wrapped__.__code__ if isinstance(kept.__wrapped__, FunctionType) else None
            if code is not None and code.co_filename.startswith(_TESTS):
                kept.cache_clear()
    gc.collect()


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def bfloat16_is_in_place() -> bool:
    """Whether XLA for CPU writes into bfloat16 arrays, scales too; before jax 0.11.2 it converts them."""
    return tuple(int(part) for part in jax.__version__.split(".")[:3]) >= (0, 11, 2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real models, traces and prompts beside the checkout; skips where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real models and traces at {DATA}")
    return DATA
