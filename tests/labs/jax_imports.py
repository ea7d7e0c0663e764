"""Tells by their text which files of the project import JAX."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_JAX = ("jax", "jaxlib", "flax", "orbax")


@cache
def loads_jax(path: Path) -> bool:
    """Whether a file, when it is imported, imports JAX, itself or by modules of the project that it imports.

    Imports inside functions do not count: they load nothing until the function is called.
    """
    return _reaches_jax(path.resolve(), set())


def _reaches_jax(path: Path, seen: set[Path]) -> bool:
    seen.add(path)
    for module in _imports(path):
        if module.split(".")[0] in _JAX:
            return True
        own = _file_of(module)
        if own is not None and own not in seen and _reaches_jax(own, seen):
            return True
    return False


@cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(_top_level_imports(ast.parse(path.read_text())))


def _top_level_imports(module: ast.Module) -> Iterator[str]:
    """Names of modules; what is imported from a module may be one itself."""
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _file_of(module: str) -> Path | None:
    """File of a module of the project."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.resolve()
    return None
