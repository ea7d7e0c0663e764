"""One small folder with all that a machine without a network needs for the check: made here, read there.

::

    FOLDER/ prepared.json   the commit, the version, a sum over the source files
            wheels/         packages that such a machine lacks
            data/           small real models, their golden tokens, a trace
            carried.tar.gz  optional, put there by hand: what an earlier run on that machine handed on
"""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from albireo_jax.core.dataclass_json import dataclass_from_json
from benchmarks.gpu_check.machine import ROOT, Source, source_here

FACTS, WHEELS, DATA = "prepared.json", "wheels", "data"

MAX_BYTES = 10 * 10**6
"""The folder must be smaller: it travels beside the checkout."""

_MISSING = ("gguf", "llguidance")
_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35))
_DATA = (
    "models/stories260k",
    "models/babyllama105",
    "golden/stories260k.json",
    "golden/babyllama105.json",
    "traces/azure_conv_2023_first300.csv",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The needs of a machine: packages that it lacks, as pip names them, and its Python."""

    packages: Sequence[str]
    python: str


def missing_packages() -> tuple[str, ...]:
    """The packages that an image with JAX, PyTorch and transformers usually lacks, as they are here.

    Where one is not here either, the project's own requirement stands for it.
    """
    return tuple(_pinned(name) for name in _MISSING)


def _pinned(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return next(each for each in _project()["dependencies"] if each.startswith(name))


def _project() -> dict[str, Any]:
    """The project's own table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def prepare_folder(folder: Path, *, data: Path, wanted: Wanted) -> int:
    """Make the folder anew and give its size in bytes.

    Raises ValueError where data is missing or the folder becomes too large, CalledProcessError where pip
    finds a package not. What an earlier run handed on stays.
    """
    for name in _DATA:
        if not (data / name).exists():
            raise ValueError(f"{data} has no {name}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WHEELS, DATA):
        shutil.rmtree(folder / name, ignore_errors=True)
    _download(wanted, folder / WHEELS)
    for name in _DATA:
        target = folder / DATA / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (data / name).is_dir():
            shutil.copytree(data / name, target, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(data / name, target)
    (folder / FACTS).write_text(json.dumps(asdict(source_here(version=_project()["version"])), indent=1))
    made = [folder / FACTS, *(folder / WHEELS).rglob("*"), *(folder / DATA).rglob("*")]
    size = sum(path.stat().st_size for path in made if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"{folder} has {size} bytes, the limit is {MAX_BYTES}")
    return size


def read_source(folder: Path) -> Source | None:
    """The code that was made ready, None where nothing was."""
    path = folder / FACTS
    return dataclass_from_json(Source, json.loads(path.read_text())) if path.is_file() else None


def unpack_wheels(folder: Path, site: Path) -> None:
    """Put the packages of all wheels where Python finds them: a wheel is an archive of what it installs."""
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _download(wanted: Wanted, folder: Path) -> None:
    folder.mkdir()
    if not wanted.packages:
        return
    # That machine's, whatever runs here; pip matches platforms exactly, so all that it would take are named.
    machine = [word for name in _PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--python-version", wanted.python, "--implementation", "cp", "--abi", "abi3"),
            *("--abi", f"cp{wanted.python.replace('.', '')}", "--abi", "none"),
            *machine,
            *("--dest", str(folder), *wanted.packages),
        ],
        check=True,
    )
