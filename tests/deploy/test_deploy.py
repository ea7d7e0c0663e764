"""The recipes in deploy/ pass their linters and schemas, and rely on what the server does."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from albireo_jax.serving.app import create_app
from albireo_jax.serving.auth import OPEN_PATHS
from albireo_jax.serving.server import make_server
from docs.hooks import reference
from tests.labs.engine_lab import lab

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SPARE_S = 5
"""Time for the process to end once its connections are closed."""


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (each for each in documents("kubernetes/albireo.yaml") if each["kind"] == kind)
    return found


POD = manifest("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def grace_s() -> float:
    """Time that the server takes at most to end after SIGTERM."""
    with lab() as engine:
        timeout_s = make_server(create_app(engine)).config.timeout_graceful_shutdown
    assert timeout_s is not None
    return timeout_s


def command_of(args: list[str]) -> list[str]:
    """The arguments of `albireo` that a container runs."""
    entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[0])
    assert entrypoint[0] == "albireo"
    return [*entrypoint[1:], *args]


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_its_linter() -> None:
    run(BIN / "hadolint", "deploy/Dockerfile")


def test_the_dockerfile_copies_what_the_wheel_is_made_of() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \./?\S*$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "albireo_jax", "models", "serving", "README.md", "LICENSE"} == names
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == let_in
    assert all((ROOT / name).exists() for name in names)


def test_each_backend_is_an_extra() -> None:
    extras = set(re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    backends = set(re.findall(r"BACKEND=(\w+)", DOCKERFILE))
    assert backends == {"cpu", "cuda12", "cuda13"}
    assert backends <= extras
    (installed,) = re.findall(r"\[\$\{BACKEND\},([\w,]+)\]", DOCKERFILE)
    assert set(installed.split(",")) <= extras


def test_the_image_runs_as_nobody_special() -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert user == [("10001", "10001")]
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("\nENTRYPOINT ")


def test_the_health_check_asks_a_path_that_needs_no_key() -> None:
    port = command_of([])[command_of([]).index("--port") + 1]
    (asked,) = re.findall(r"urlopen\('http://127\.0\.0\.1:(\d+)(/\w+)'", DOCKERFILE)
    assert asked[0] == port
    assert asked[1] in OPEN_PATHS
    assert f"EXPOSE {port}" in DOCKERFILE


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_as_their_schema_says(name: str) -> None:
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)


def test_compose_mounts_what_is_there_and_stops_no_sooner_than_the_server() -> None:
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
            if "/" not in source and not source.startswith("$"):
                assert source in compose["volumes"]
    server = services["albireo"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).samefile(
        DEPLOY / "Dockerfile"
    )
    assert server["read_only"] is True
    assert int(server["stop_grace_period"].removesuffix("s")) >= grace_s() + SPARE_S


def test_prometheus_scrapes_the_service_of_compose() -> None:
    (config,) = documents("prometheus.yml")
    (job,) = config["scrape_configs"]
    ((target,),) = (each["targets"] for each in job["static_configs"])
    host, _, port = target.partition(":")
    assert host in documents("compose.yaml")[0]["services"]
    assert port == command_of([])[command_of([]).index("--port") + 1]
    assert job["metrics_path"] in reference.routes()


def test_grafana_finds_its_data_source_and_board() -> None:
    (source,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    assert source["url"].startswith("http://prometheus:")
    (provider,) = documents("grafana/provisioning/dashboards/albireo.yaml")[0]["providers"]
    mounts = documents("compose.yaml")[0]["services"]["grafana"]["volumes"]
    assert any(f":{provider['options']['path']}/albireo.json:" in mount for mount in mounts)


@pytest.mark.parametrize("document", documents("kubernetes/albireo.yaml"), ids=lambda each: each["kind"])
def test_manifests_are_as_their_schema_says(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("probe", PROBES)
def test_probes_ask_paths_that_are_served_without_a_key(probe: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    assert asked["path"] in OPEN_PATHS
    assert "GET" in reference.routes()[asked["path"]]
    (port,) = (each for each in CONTAINER["ports"] if each["name"] == asked["port"])
    assert str(port["containerPort"]) in command_of([])


def test_the_pod_gets_the_time_that_the_server_takes_to_end() -> None:
    sleep_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed_s = sleep_s + grace_s() + SPARE_S
    assert needed_s <= POD["terminationGracePeriodSeconds"] <= math.ceil(needed_s) + SPARE_S


def test_the_pod_runs_as_the_image_does() -> None:
    assert POD["securityContext"]["runAsUser"] == 10001
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    assert CONTAINER["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {"/tmp", "/home/albireo/.cache"} <= mounts
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {each["name"] for each in POD["volumes"]}


def test_the_service_leads_to_the_pod() -> None:
    service, deployment = manifest("Service")["spec"], manifest("Deployment")["spec"]
    assert service["selector"] == deployment["selector"]["matchLabels"]
    assert service["selector"].items() <= deployment["template"]["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] in [port["name"] for port in CONTAINER["ports"]]
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in OPEN_PATHS


@pytest.mark.parametrize(
    "args",
    [CONTAINER["args"], documents("compose.yaml")[0]["services"]["albireo"]["command"]],
    ids=["kubernetes", "compose"],
)
def test_arguments_of_containers_are_flags_of_the_command(args: list[str]) -> None:
    command, *rest = command_of(args)
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert flags <= set(reference.flag_names(reference.commands()[command]))
