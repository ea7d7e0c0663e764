"""What is built and installed: one top-level package, with the linked folders inside."""

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from tests.house.source_files import ROOT


def test_the_wheel_holds_one_package_with_models_and_serving(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"albireo_jax"}
    assert "albireo_jax/models/registry.py" in names
    assert "albireo_jax/serving/app.py" in names
    assert "albireo_jax/py.typed" in names
    folders = {part for name in names for part in PurePosixPath(name).parts}
    assert folders & {"benchmarks", "tests", "scripts", "examples", "docs", "labs"} == set()


def test_a_bare_import_of_a_linked_folder_says_where_it_belongs() -> None:
    for folder in ("models", "serving"):
        result = subprocess.run(
            [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert result.returncode != 0
        assert f"import albireo_jax.{folder}" in result.stderr


def test_the_control_plane_does_not_load_jax() -> None:
    modules = [
        "core.config",
        "sched.scheduler",
        "engine.loop",
        "engine.service",
        "sim.simulated_executor",
        "text.tokenizer",
        "serving.app",
        "cli",
    ]
    code = "import sys\n" + "".join(f"import albireo_jax.{name}\n" for name in modules)
    code += "loaded = {name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'flax', 'orbax'}\n"
    code += "assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
