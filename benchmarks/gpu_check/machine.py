"""The device, the code and the packages of a run, found without starting JAX."""

import hashlib
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from albireo_jax.measure.records import Commit, Device, cpu_device, current_commit, versions
from albireo_jax.sweep.devices import gpu_device, gpus_here

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "numpy",
    "nvidia-cuda-nvrtc",
    "nvidia-cublas",
    "torch",
    "transformers",
    "gguf",
    "llguidance",
)
"""Distributions whose versions a run's record names, where they are there."""

_SOURCES = ("albireo_jax", "models", "serving", "benchmarks", "scripts")
_SUFFIXES = (".py", ".sh", ".cu", ".h")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The code as it was when it was made ready to travel: its commit, its version, a sum over its files."""

    commit: Commit | None
    version: str
    digest: str


def device_here(*, on_cpu: bool) -> Device:
    """The CPU, or the first GPU as its driver describes it; raises RuntimeError where there is none."""
    if on_cpu:
        return cpu_device()
    gpus = gpus_here()
    if not gpus:
        raise RuntimeError(
            "there is no GPU here: its driver's nvidia-smi finds none; --device cpu goes without"
        )
    return replace(gpu_device(gpus[:1]), detail=_described())


def source_here(*, version: str) -> Source:
    """The code of this checkout."""
    return Source(commit=current_commit(ROOT), version=version, digest=digest_here())


def digest_here() -> str:
    """A sum over the names and contents of all source files: two checkouts with the same one are equal."""
    total = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                total.update(f"{path.relative_to(ROOT)}\n{path.stat().st_size}\n".encode())
                total.update(path.read_bytes())
    return total.hexdigest()


def commit_of(source: Source | None) -> Commit | None:
    """The commit of the code that runs here: this checkout's, else the one that was made ready.

    It is dirty if files changed since then.
    """
    here = current_commit(ROOT)
    if here is not None or source is None or source.commit is None:
        return here
    return replace(source.commit, dirty=source.commit.dirty or digest_here() != source.digest)


def package_versions() -> dict[str, str]:
    """Versions of what is there of `PACKAGES`."""
    return versions(PACKAGES)


def _described() -> str:
    """The details that tell GPUs of one name apart, in the driver's words; empty where it has none."""
    asked = ("compute_cap", "driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    done = subprocess.run(query, check=False, capture_output=True, text=True)
    values = done.stdout.splitlines()[0].split(",") if done.returncode == 0 and done.stdout else []
    return ", ".join(f"{name} {value.strip()}" for name, value in zip(asked, values, strict=False))
