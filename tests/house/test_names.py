"""A name stands for one subject: no two modules and no two public classes share one."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.house.source_files import PACKAGE, name, python_files, tree

COMMANDS = "albireo_jax/cli/"
"""Modules in here are named after their commands, whatever else is called so."""

SAME_SUBJECT = {
    "ChatLogprobs": "the schema of what `openai_logprobs` makes",
    "CompletionLogprobs": "the schema of what `openai_logprobs` makes",
    "TokenLogprob": "the schema of an entry",
    "ToolCall": "the schema of a call that was read in an answer",
    "Usage": "the schema of what `openai_objects` makes",
}
"""Public classes whose schema for OpenAPI, in `serving/schemas/answer_objects.py`, has their public name."""


def _shared(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {own: places for own, places in names.items() if len(places) > 1}


def modules_by_name(paths: list[Path]) -> dict[str, list[str]]:
    """Files of each module name."""
    named: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if not path.stem.startswith("__") and not name(path).startswith(COMMANDS):
            named[path.stem].append(name(path))
    return named


def test_no_two_modules_share_a_name() -> None:
    assert _shared(modules_by_name(python_files(*PACKAGE, "benchmarks", "scripts"))) == {}


def test_no_two_public_classes_share_a_name() -> None:
    classes: dict[str, list[str]] = defaultdict(list)
    for path in python_files(*PACKAGE):
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(name(path))
    schemas = "serving/schemas/answer_objects.py"
    for own in SAME_SUBJECT:
        assert schemas in classes[own], f"{own} is no longer a schema"
        classes[own].remove(schemas)
    assert _shared(classes) == {}
