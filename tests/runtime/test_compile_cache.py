"""Compiled programs are kept within a bound, wherever their folder is, and an engine starts without one."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from albireo_jax.runtime.compile import use_persistent_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def options_as_before() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _compile(size: int) -> None:
    jax.jit(lambda x: (x * size).sum()).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()


def _entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*-cache")}


def _read_at(path: Path) -> float:
    return path.stat().st_atime


def test_a_folder_that_was_moved_is_used_as_before(tmp_path: Path) -> None:
    use_persistent_cache(tmp_path / "here")
    _compile(11)
    before = _entries(tmp_path / "here")
    assert before
    (tmp_path / "here").rename(tmp_path / "there")
    use_persistent_cache(tmp_path / "there")
    jax.clear_caches()
    _compile(11)
    assert _entries(tmp_path / "there") == before
    assert not (tmp_path / "here").exists()


def test_the_least_recently_used_programs_are_dropped_at_a_start(tmp_path: Path) -> None:
    use_persistent_cache(tmp_path)
    for nth, length in enumerate((21, 22, 23, 24)):
        known = _entries(tmp_path).keys()
        _compile(length)
        (name,) = _entries(tmp_path).keys() - known
        os.utime(tmp_path / name, (1000 + nth, 1000))  # read one after the other, written at once
    first, _, third, fourth = sorted(_entries(tmp_path), key=lambda name: _read_at(tmp_path / name))
    os.utime(tmp_path / first, (2000, 1000))
    sizes = _entries(tmp_path)
    use_persistent_cache(tmp_path, max_bytes=sizes[first] + sizes[third] + sizes[fourth])
    assert set(_entries(tmp_path)) == {first, third, fourth}
    use_persistent_cache(tmp_path, max_bytes=sizes[first])
    assert set(_entries(tmp_path)) == {first}


def test_processes_that_start_together_do_not_wait_for_each_other(tmp_path: Path) -> None:
    use_persistent_cache(tmp_path)
    _compile(25)
    assert {path.name for path in tmp_path.iterdir()} == set(_entries(tmp_path))  # there is no lock


@pytest.mark.parametrize("folder", [None, Path(__file__) / "below a file", Path("/proc/self/fdinfo")])
def test_programs_compile_where_none_can_be_kept(
    folder: Path | None, caplog: pytest.LogCaptureFixture
) -> None:
    if folder is not None and folder.is_relative_to("/proc") and sys.platform != "linux":
        pytest.skip("only Linux has /proc")
    with caplog.at_level(logging.WARNING):
        use_persistent_cache(folder)
        _compile(31)
    (told,) = caplog.messages
    assert told.startswith("compiled programs are ")
