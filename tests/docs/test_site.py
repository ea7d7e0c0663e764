"""The site is built without a warning, needs no network, and shows every flag, field, route and metric."""

import asyncio
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from albireo_jax.serving.app import create_app
from docs.hooks import reference
from tests.labs.engine_lab import lab
from tests.labs.http_lab import in_process

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = re.compile(r"<(?:script|img|source|iframe|link)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*\"")
ENERGY = {"albireo_energy_joules_total", "albireo_energy_joules_per_output_token"}
"""Metrics of devices that count their energy."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; mkdocs ends with an error for a broken link, anchor or marker."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def page(site: Path, name: str) -> str:
    """The text of a page, its tags taken out."""
    return unescape(re.sub(r"<[^>]+>", " ", (site / name).read_text()))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.glob("**/*.html"):
        assert ELSEWHERE.findall(path.read_text()) == [], path.name
    for path in site.glob("**/*.css"):
        assert not re.search(r"@import|url\((?!\"?data:|\"?\.|\"?#)", path.read_text()), path.name


def test_every_marker_was_replaced(site: Path) -> None:
    for path in site.glob("**/*.html"):
        assert "reference:" not in path.read_text(), path.name


def test_every_flag_of_every_command_is_there(site: Path) -> None:
    words = set(page(site, "flags.html").split())
    commands = reference.commands()
    assert {"serve", "generate", "plan", "report", "sweep", "bench throughput"} <= set(commands)
    for name, command in commands.items():
        flags = reference.flag_names(command)
        assert [flag for flag in flags if flag not in {word.rstrip(",") for word in words}] == [], name


def test_every_command_has_a_section(site: Path) -> None:
    html = (site / "flags.html").read_text()
    for name in reference.commands():
        assert f'id="{name.replace(" ", "-")}"' in html, name


@pytest.mark.parametrize("path", reference.BODIES)
def test_every_field_is_in_the_matrix(site: Path, path: str) -> None:
    rows = re.findall(r"<tr>\s*<td><code>(\w+)</code></td>", (site / "api.html").read_text())
    body = reference.BODIES[path]
    wanted = {*body.model_fields, *body.refused, *reference.OPENAI_FIELDS[path], *reference.VLLM_FIELDS[path]}
    assert wanted - set(rows) == set()


@pytest.mark.parametrize("path", reference.BODIES)
def test_the_matrix_says_what_the_schemas_do(path: str) -> None:
    body = reference.BODIES[path]
    for name in {*reference.OPENAI_FIELDS[path], *reference.VLLM_FIELDS[path]}:
        fate = reference.fate(name, body)
        assert fate.startswith("refused") == (name in body.refused and name not in body.model_fields)
        assert (fate == "**honoured**") == (name in body.model_fields)


def test_every_route_is_there(site: Path) -> None:
    text = page(site, "api.html")
    served = reference.routes()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health"} <= set(served)
    assert [path for path in (*served, *reference.OTHER_ROUTES) if path not in text] == []
    assert not set(served) & set(reference.OTHER_ROUTES)


def test_the_metrics_are_those_that_are_scraped(site: Path) -> None:
    async def scrape() -> str:
        with lab() as engine:
            async with in_process(create_app(engine)) as client:
                return (await client.get("/metrics")).text

    scraped = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(asyncio.run(scrape()))
    }
    assert set(reference.metric_names()) - ENERGY == scraped
    words = page(site, "metrics.html").split()
    assert [name for name in scraped | ENERGY if name not in words] == []


def test_a_marker_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no reference 'nothing'"):
        reference.filled("<!-- reference: nothing -->")
