"""A sampling parameter is named where it is declared and where it takes effect; a constant stands once."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from albireo_jax.core.token_sampling import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("albireo_jax", "models", "serving")
SUFFIXES = (".py", ".cu", ".h")
MAX_FILES = 5
COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
OWN_LOADS = ("albireo_jax/cli", "albireo_jax/measure", "albireo_jax/report", "albireo_jax/sweep")
"""`bench`, `report` and `sweep` have flags for the temperature and the top-p of the load that they offer."""

ONLY_MENTION = ("albireo_jax/sim/planning/plan_report.py", "serving/schemas/foreign_fields.py")
"""Sentences of a report, and what other servers call their fields."""


def python_words(source: str) -> str:
    """The names and texts of a module without its comments and docstrings, a line each."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a text that stands alone is documentation
            kept = [line for line in body if not (isinstance(line, ast.Expr) and _is_text(line.value))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def names(parameter: str, words: str) -> bool:
    """Whether a source names a parameter: as `min_p`, `min_p_R`, `MinP`, `--min-p` or `MIN_P`."""
    spelled = parameter.replace("_", "[_-]?")
    pattern = rf"(?<![a-z])(?:[a-z]+_)?{spelled}(?:_[a-z0-9]+)?(?![a-z])"
    camel = rf"{parameter.title().replace('_', '')}(?![a-z])"
    return re.search(pattern, words.replace("lax.top_k", ""), re.IGNORECASE) is not None or (
        re.search(camel, words) is not None
    )


@cache
def sources() -> dict[str, str]:
    """The source files of the package by their places."""
    paths = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.suffix in SUFFIXES)
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


@cache
def words_of(place: str) -> str:
    """A source file without comments and docstrings."""
    source = sources()[place]
    return python_words(source) if place.endswith(".py") else COMMENTS.sub("", source)


def files_that_name(parameter: str) -> list[str]:
    """Source files that name a parameter other than in comments and docstrings."""
    return [place for place in sources() if names(parameter, words_of(place))]


@pytest.mark.parametrize(
    ("parameter", "besides"),
    [
        ("min_p", ()),
        ("top_k", ()),
        ("top_p", OWN_LOADS + ONLY_MENTION),
        ("temperature", OWN_LOADS + ONLY_MENTION),
    ],
)
def test_few_files_name_a_sampling_parameter(parameter: str, besides: tuple[str, ...]) -> None:
    assert parameter in PARAMETERS
    found = [place for place in files_that_name(parameter) if not place.startswith(besides)]
    assert {"albireo_jax/core/token_sampling.py", "albireo_jax/sampling/filters.py"} <= set(found)
    assert len(found) <= MAX_FILES, found


@pytest.mark.parametrize(
    "source",
    [
        "min_p = 0",
        "rows.min_p_R",
        "f(min_p=1)",
        "{'min_p': 1}",
        "flag('--min-p')",
        "MIN_P = 1",
        "def f(min_p): ...",
        "f'{x.min_p:g}'",
        "MinPFlag = 1",
        "def f():\n    return 'a min-p of 0.1'",
    ],
)
def test_every_spelling_of_a_parameter_counts(source: str) -> None:
    assert names("min_p", python_words(source))


@pytest.mark.parametrize("source", ["lax.min_peak", "'min_p'", "def f():\n    'A min_p.'", "# min_p"])
def test_documentation_and_other_names_do_not_count(source: str) -> None:
    assert not names("min_p", python_words(source))


def test_a_constant_is_defined_in_one_file() -> None:
    found: dict[str, set[str]] = {}
    for place, source in sources().items():
        for node in ast.parse(source).body if place.endswith(".py") else ():
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]+", target.id):
                    found.setdefault(target.id, set()).add(place)
    assert {"NULL_PAGE", "NOT_FINITE", "ARCHITECTURES", "MAX_JSON_DEPTH", "MAX_SEED"} <= set(found)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
