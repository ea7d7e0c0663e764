"""Programs compiled at once: all of them, by as many threads as there are cores, within bounds."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from albireo_jax.runtime.compile import compile_all, num_threads


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 2), (3, 3), (8, 8), (16, 8), (192, 8)])
def test_compilers_are_as_many_as_the_cores_within_bounds(cores: int, threads: int) -> None:
    assert num_threads(cores) == threads


def test_every_program_is_compiled_and_reported_once() -> None:
    def lower(size: int) -> jax.stages.Lowered:
        return jax.jit(lambda x: x * size).lower(jax.ShapeDtypeStruct((size,), jnp.float32))

    seen: list[tuple[int, int]] = []
    programs = {size: partial(lower, size) for size in range(1, 21)}
    compiled = compile_all(programs, progress=lambda done, total: seen.append((done, total)))
    assert list(compiled) == list(programs)
    assert seen == [(done, 20) for done in range(21)]
    for size, program in compiled.items():
        assert program(jnp.ones(size, jnp.float32)).tolist() == [float(size)] * size


def test_a_program_that_cannot_be_lowered_ends_the_start() -> None:
    def broken() -> jax.stages.Lowered:
        raise ValueError("no such shape")

    with pytest.raises(ValueError, match="no such shape"):
        compile_all({"broken": broken})
