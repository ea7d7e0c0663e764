"""Imports flow one way: the contracts of pyproject.toml, and nothing shipped leans on what is not."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.house.source_files import PACKAGE, ROOT, imported_modules, name, python_files, tree

NOT_SHIPPED = ("benchmarks", "tests", "scripts", "examples", "docs")


def test_the_import_contracts_are_kept() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_package_imports_nothing_that_is_not_shipped() -> None:
    found = [
        f"{name(path)}: {module}"
        for path in python_files(*PACKAGE)
        for module in imported_modules(tree(path))
        if module.split(".")[0] in NOT_SHIPPED
    ]
    assert found == []


def test_benchmarks_scripts_and_examples_import_no_tests() -> None:
    found = [
        f"{name(path)}: {module}"
        for path in python_files("benchmarks", "scripts", "examples")
        for module in imported_modules(tree(path))
        if module.split(".")[0] == "tests"
    ]
    assert found == []


def test_no_file_of_tests_imports_another_file_of_tests() -> None:
    """Tests share what lies in labs, so that each can be moved or dropped alone."""
    found = [
        f"{name(path)}: {module}"
        for path in python_files("tests")
        for module in imported_modules(tree(path))
        if ".test_" in module or ".conftest" in module
    ]
    assert found == []


def test_no_file_of_tests_edits_the_path_of_modules() -> None:
    found = [
        f"{name(path)}:{node.lineno}"
        for path in python_files("tests")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("sys.path.")
    ]
    assert found == []
