"""The files of the project that the house rules read, and their syntax trees."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("albireo_jax", "models", "serving")
OWN = (*PACKAGE, "benchmarks", "scripts", "tests", "examples", "docs")


def python_files(*folders: str) -> list[Path]:
    """All Python files in folders of the root; a link to a folder is not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).glob("**/*.py"))


@cache
def source(path: Path) -> str:
    """Text of a file."""
    return path.read_text()


@cache
def tree(path: Path) -> ast.Module:
    """Syntax tree of a file."""
    return ast.parse(source(path))


def name(path: Path) -> str:
    """Path below the root, as a breach names it."""
    return str(path.relative_to(ROOT))


def imported_modules(module: ast.Module) -> Iterator[str]:
    """Full names of what is imported anywhere in a module, modules and names alike."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
