"""The size and style budgets of the code, held as tests. Raising one takes a commit that says why."""

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.house.source_files import OWN, PACKAGE, ROOT, name, python_files, tree

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_POSITIONAL = 3
PROBES = ("getattr", "hasattr", "setattr", "delattr")

Rule = Callable[[ast.Module], Iterator[str]]
"""Yields a line for each place of a module that breaks it."""


def _functions(module: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def long_functions(module: ast.Module) -> Iterator[str]:
    """Functions of more lines than fit on a screen."""
    for function in _functions(module):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield f"{function.lineno}: {function.name} has {length} lines"


def positional_arguments(module: ast.Module) -> Iterator[str]:
    """Public functions of many positional arguments; a closure has the signature that its caller asks for."""
    nested = {id(inner) for outer in _functions(module) for inner in _functions(outer) if inner is not outer}
    for function in _functions(module):
        arguments = [argument.arg for argument in function.args.posonlyargs + function.args.args]
        own = [argument for argument in arguments if argument not in ("self", "cls")]
        if len(own) > MAX_POSITIONAL and not function.name.startswith("_") and id(function) not in nested:
            yield f"{function.lineno}: {function.name} takes {len(own)} positional arguments"


def globals_written(module: ast.Module) -> Iterator[str]:
    """Functions that rebind names of their module."""
    for node in ast.walk(module):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global"


def probes(module: ast.Module) -> Iterator[str]:
    """Attributes that are looked up by a string."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PROBES:
            yield f"{node.lineno}: {node.func.id}"


def environment_variables(module: ast.Module) -> Iterator[str]:
    """Uses of the process's environment."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            yield f"{node.lineno}: an environment variable"


def swallowed_exceptions(module: ast.Module) -> Iterator[str]:
    """Handlers that do nothing."""
    for node in ast.walk(module):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            yield f"{node.lineno}: a swallowed exception"


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in python_files(*OWN)}
    assert {file: lines for file, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def _breaches(rule: Rule, *folders: str) -> list[str]:
    return [f"{name(path)}:{breach}" for path in python_files(*folders) for breach in rule(tree(path))]


def test_functions_are_short() -> None:
    assert _breaches(long_functions, *OWN) == []


@pytest.mark.parametrize(
    "rule",
    [positional_arguments, globals_written, probes, environment_variables, swallowed_exceptions],
    ids=lambda rule: rule.__name__,
)
def test_the_package_is_free_of(rule: Rule) -> None:
    assert _breaches(rule, *PACKAGE) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (positional_arguments, "def f(a, b, c, d): ..."),
        (globals_written, "def f():\n    global x"),
        (probes, "getattr(x, 'y')"),
        (environment_variables, "import os\nos.environ['X']"),
        (swallowed_exceptions, "try:\n    f()\nexcept OSError:\n    pass"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_breach_is_found(rule: Rule, text: str) -> None:
    assert len(list(rule(ast.parse(text)))) == 1


def test_the_two_links_lead_to_the_top_level_folders() -> None:
    for folder in ("models", "serving"):
        link = ROOT / "albireo_jax" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
