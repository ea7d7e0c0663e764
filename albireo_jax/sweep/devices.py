"""The NVIDIA GPUs of this machine, found without starting JAX on them."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.measure.records import Device

_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """A GPU as its driver names it."""

    name: str
    memory_bytes: int


def gpus_here() -> list[InstalledGpu]:
    """All GPUs, in the driver's order; none where there is no driver."""
    if shutil.which(_QUERY[0]) is None:
        return []
    done = subprocess.run(_QUERY, capture_output=True, text=True, check=False)
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[InstalledGpu]:
    """GPUs from lines of `name, MiB`."""
    rows = (line.rsplit(",", 1) for line in text.splitlines() if "," in line)
    return [InstalledGpu(name=name.strip(), memory_bytes=int(memory) * 2**20) for name, memory in rows]


def gpu_device(gpus: Sequence[InstalledGpu]) -> Device:
    """GPUs as the device of a record; its memory is that of one."""
    return Device(
        kind="gpu",
        name=gpus[0].name,
        count=len(gpus),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus),
    )
