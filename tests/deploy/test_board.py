"""The Grafana board is of Grafana's schema, and its expressions name metrics and labels that are there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from docs.hooks import reference
from tests.labs.engine_lab import lab
from tests.labs.metrics_lab import scraped

BOARD = json.loads((Path(__file__).resolve().parents[2] / "deploy/grafana/albireo.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SUFFIXES = ("_bucket", "_sum", "_count")
GRID = 24
TARGET_LABELS = {"job", "instance", "le"}
"""Labels that Prometheus adds, and that of buckets."""


def metrics_of(expression: str) -> set[str]:
    found = re.findall(r"\b(albireo_\w+|vllm:\w+)", expression)
    return {re.sub(f"({'|'.join(SUFFIXES)})$", "", name) for name in found}


def labels_of(expression: str) -> set[str]:
    grouped = re.findall(r"\b(?:by|ignoring) \(([\w, ]+)\)", expression)
    return {name.strip() for names in grouped for name in names.split(",")} - TARGET_LABELS


def lost(given: Any, known: Any, place: str = "") -> list[str]:
    """Where `known` lacks or changes what was `given`."""
    if isinstance(given, dict):
        return [
            each
            for key, value in given.items()
            for each in (
                lost(value, known[key], f"{place}.{key}") if key in known else [f"{place}.{key} is unknown"]
            )
        ]
    if isinstance(given, list):
        pairs = enumerate(zip(given, known, strict=True))
        return [each for index, (value, other) in pairs for each in lost(value, other, f"{place}[{index}]")]
    return [] if given == known else [f"{place} is {known!r}, not {given!r}"]


def test_the_board_is_of_grafanas_schema() -> None:
    read = Dashboard.from_json(BOARD)
    assert lost(BOARD, json.loads(JSONEncoder().encode(read))) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    wrong = {**BOARD, "tittle": "albireo"}
    assert lost(wrong, json.loads(JSONEncoder().encode(Dashboard.from_json(wrong)))) == [".tittle is unknown"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_name_metrics_that_are_there(expression: str) -> None:
    named = metrics_of(expression)
    assert named
    assert named <= set(reference.metric_names())
    assert '{job=~"$job",instance=~"$instance"}' in expression


def test_expressions_group_by_labels_that_are_there() -> None:
    with lab() as engine:
        body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
        found = text_string_to_metric_families(scraped(engine, body).text)
        labels = {sample.name: set(sample.labels) for family in found for sample in family.samples}
    for panel in PANELS:
        for target in panel["targets"]:
            known = set[str]().union(*(labels.get(name, set()) for name in metrics_of(target["expr"])))
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = labels_of(target["expr"])
            assert shown <= grouped
            assert grouped <= known | ({"route"} if "sampling" in target["expr"] else set())


def test_every_metric_of_ours_is_on_the_board() -> None:
    ours = {name for name in reference.metric_names() if name.startswith("albireo_")}
    assert ours - set().union(*map(metrics_of, EXPRESSIONS)) == set()


def test_panels_lie_beside_each_other_and_have_a_name_and_a_number_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        covered = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert place["x"] + place["w"] <= GRID
        assert not cells & covered, panel["title"]
        cells |= covered
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert all(panel["description"] for panel in PANELS)
