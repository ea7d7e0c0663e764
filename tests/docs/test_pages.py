"""Every statement of the documentation that can be checked against the repository is true of it."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(
    [
        *(ROOT / "docs").glob("**/*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    ]
)
MAX_README_LINES = 100

CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?")
DOTTED = re.compile(r"((?:albireo_jax|benchmarks)(?:\.\w+)+)(?:\(.*\))?")
RECORD = re.compile(r"[a-z0-9.-]+-\d{8}-\d{4}[a-z-]*\.(?:json|svg)")
TOP = {"albireo_jax", "models", "serving", "benchmarks", "scripts", "tests", "docs", "examples", "deploy"}
INVENTED = ("NEW",)
"""Stands in a path for a name that a reader chooses."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


def missing_paths(text: str) -> list[str]:
    """Paths of the repository that a text names in code spans, and that are not there."""
    found: list[str] = []
    for span in CODE.findall(text):
        for path in PATH.findall(span):
            names_a_file = path.split("/")[0] in TOP or path.endswith((".py", ".cu", ".sh"))
            if span == path and names_a_file and not any(word in path for word in INVENTED):
                found += [] if (ROOT / path).exists() else [path]
    return found


def missing_names(text: str) -> list[str]:
    """Dotted names of the code that a text names in code spans, and that cannot be imported."""
    spans = [match.group(1) for span in CODE.findall(text) if (match := DOTTED.fullmatch(span))]
    return [name for name in spans if not name.endswith((".md", ".py")) and not exists(name)]


def exists(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def unnamed_devices(text: str) -> list[str]:
    """Records that a text quotes in a block that does not name the device."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        for name in dict.fromkeys(RECORD.findall(block)):
            said = " ".join(RECORD.sub("", block).split()).lower()
            found += [f"{name}: {word}" for word in device_words(name) if word.lower() not in said]
    return found


def device_words(name: str) -> list[str]:
    """Words that must stand beside a quoted record."""
    path = RESULTS / name
    if path.suffix == ".svg":
        return []
    device = json.loads(path.read_text())["device"]
    if device["kind"] == "simulated":
        return ["simulated"]
    if device["kind"] == "gpu":
        return ["without a GPU"] if "without a gpu" in device["name"].lower() else [device["name"]]
    return [device["name"], "CPU", *(["virtual"] if device["virtual_devices"] else [])]


@each_page
def test_paths_of_the_repository_exist(page: Path) -> None:
    assert missing_paths(prose(page)) == []


@each_page
def test_names_of_the_code_exist(page: Path) -> None:
    assert missing_names(prose(page)) == []


@each_page
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(prose(page)) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_page
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for language, code in BLOCK.findall(page.read_text()):
        if language == "python":
            tree = ast.parse(code)
            imports: list[ast.stmt] = [
                node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            names = compile(ast.Module(imports, type_ignores=[]), str(page), "exec")
            exec(names, {})
            compile(code, str(page), "exec")


@each_page
def test_quoted_records_exist_and_name_a_commit(page: Path) -> None:
    for name in RECORD.findall(page.read_text()):
        path = RESULTS / name
        assert path.is_file(), f"{name} is not in {RESULTS.name}"
        if path.suffix == ".json":
            revision = json.loads(path.read_text())["commit"]["revision"]
            assert re.fullmatch(r"[0-9a-f]{40}", revision), f"{name} names no commit"


@each_page
def test_quoted_records_stand_beside_their_device(page: Path) -> None:
    assert unnamed_devices(page.read_text()) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_a_fault_is_found() -> None:
    assert missing_paths("`serving/nothing.py`, `models/NEW.py` and `a/b`") == ["serving/nothing.py"]
    assert missing_names("`albireo_jax.LLM` and `albireo_jax.core.config.Nothing`") == [
        "albireo_jax.core.config.Nothing"
    ]
    record = next(RESULTS.glob("host-cpu-*.json")).name
    assert len(unnamed_devices(f"It takes 1 µs (`{record}`).\n\nOn an AMD EPYC (CPU).")) == 2
    assert unnamed_devices(f"It takes 1 µs on\nan AMD EPYC (CPU; `{record}`).") == []
