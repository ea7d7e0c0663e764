"""The size and style budgets of the code, held as tests. Raising one takes a commit that says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_POSITIONAL = 3
PROBES = ("getattr", "hasattr", "setattr", "delattr")

LIBRARY = sorted(
    path for folder in ("albireo_jax", "models", "serving") for path in (ROOT / folder).glob("**/*.py")
)
ALL = LIBRARY + sorted(
    path for folder in ("benchmarks", "scripts", "tests") for path in (ROOT / folder).glob("**/*.py")
)


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def breaches(source: str) -> list[str]:
    """What in `source` breaks a budget of the library, a line each."""
    tree = ast.parse(source)
    found = file_breaches(source)
    nested = {id(inner) for outer in _functions(tree) for inner in _functions(outer) if inner is not outer}
    for function in _functions(tree):
        if id(function) in nested:
            continue  # a closure has the signature that its caller asks for
        arguments = [argument.arg for argument in function.args.posonlyargs + function.args.args]
        own = [name for name in arguments if name not in ("self", "cls")]
        if len(own) > MAX_POSITIONAL and not function.name.startswith("_"):
            found.append(f"line {function.lineno}: {function.name} takes {len(own)} positional arguments")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PROBES:
            found.append(f"line {node.lineno}: {node.func.id}")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            found.append(f"line {node.lineno}: an environment variable")
        if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
            found.append(f"line {node.lineno}: a swallowed exception")
    return found


def file_breaches(source: str) -> list[str]:
    """What in `source` is too long."""
    lines = len(source.splitlines())
    found = [f"{lines} lines in the file"] if lines > MAX_FILE_LINES else []
    for function in _functions(ast.parse(source)):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"line {function.lineno}: {function.name} has {length} lines")
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_keeps_its_budgets(path: Path) -> None:
    assert breaches(path.read_text()) == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert file_breaches(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n" * (MAX_FILE_LINES + 1),
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
        "def f(a, b, c, d): ...",
        "def f():\n    global x",
        "getattr(x, 'y')",
        "import os\nos.environ['X']",
        "try:\n    f()\nexcept OSError:\n    pass",
    ],
)
def test_a_breach_is_found(source: str) -> None:
    assert len(breaches(source)) == 1


def test_the_two_links_lead_to_the_top_level_folders() -> None:
    for name in ("models", "serving"):
        link = ROOT / "albireo_jax" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
