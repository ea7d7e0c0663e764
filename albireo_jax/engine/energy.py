"""Energy that the engine's GPUs took, from the counter that NVIDIA's driver keeps for each.

A counter is read when somebody asks, never by the engine's loop. It counts what the whole device takes, in
millijoules since the driver was loaded, idle time and other programs on it included. Where there is none the
reading says why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_GPU_PLATFORMS = ("gpu", "cuda")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Nvml(Protocol):
    """What is used of the module `pynvml`; its functions raise its `NVMLError`."""

    @property
    def NVMLError(self) -> type[Exception]:  # noqa: N802
        """What goes wrong in the driver."""
        ...

    def nvmlInit(self) -> None:  # noqa: N802
        """Load the driver's library."""
        ...

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any:  # noqa: N802
        """A device by its number among all of the machine."""
        ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Any:  # noqa: N802
        """A device by its name for life."""
        ...

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, /) -> int:  # noqa: N802
        """Millijoules since the driver was loaded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReading:
    """Joules since a meter was opened, of all its devices; None where they are not known, for a `reason`."""

    joules: float | None
    reason: str = ""

    def since(self, before: "EnergyReading") -> "EnergyReading":
        """What was taken between an earlier reading and this one."""
        if self.joules is None or before.joules is None:
            return EnergyReading(joules=None, reason=self.reason or before.reason)
        return EnergyReading(joules=self.joules - before.joules)


class EnergyMeter:
    """Adds up the counters of some devices; any thread may read it."""

    def __init__(self, nvml: Nvml, handles: Sequence[Any]) -> None:
        self._nvml = nvml
        self._handles = tuple(handles)
        self._began_mj = self._total_mj()

    def read(self) -> EnergyReading:
        """What the devices took since the meter was opened; costs a call of the driver for each."""
        try:
            total_mj = self._total_mj()
        except self._nvml.NVMLError as error:
            return EnergyReading(joules=None, reason=_reason(error))
        if total_mj < self._began_mj:
            return EnergyReading(
                joules=None, reason="the energy counter began again: the driver was reloaded"
            )
        return EnergyReading(joules=(total_mj - self._began_mj) / 1e3)

    def _total_mj(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)


class NoEnergyMeter:
    """Stands where there is no counter; every reading gives the reason."""

    def __init__(self, reason: str) -> None:
        self._reading = EnergyReading(joules=None, reason=reason)

    def read(self) -> EnergyReading:
        """No joules."""
        return self._reading


Meter = EnergyMeter | NoEnergyMeter


def open_meter(device_ids: Sequence[int], *, platform: str) -> Meter:
    """A meter of JAX's devices of these numbers; one without joules on a platform that has no counter.

    JAX numbers the devices that CUDA_VISIBLE_DEVICES names in its order, the driver all of the machine.
    """
    if platform not in _GPU_PLATFORMS:
        return NoEnergyMeter(f"devices of the platform {platform} have no energy counter")
    import pynvml  # reads no driver yet, but is not needed without a GPU

    return gpu_meter(device_ids, nvml=pynvml, visible=os.environ.get(_VISIBLE))


def gpu_meter(device_ids: Sequence[int], *, nvml: Nvml, visible: str | None) -> Meter:
    """A meter over `nvml` of those devices among the `visible` ones, a list like "2,3"; None: of all."""
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    if names is not None and max(device_ids) >= len(names):
        return NoEnergyMeter(f"device {max(device_ids)} is not among those of {_VISIBLE}={visible}")
    chosen = [str(index) if names is None else names[index] for index in device_ids]
    try:
        nvml.nvmlInit()
        return EnergyMeter(nvml, [_handle(nvml, name) for name in chosen])
    except nvml.NVMLError as error:
        return NoEnergyMeter(_reason(error))


def _handle(nvml: Nvml, name: str) -> Any:
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _reason(error: Exception) -> str:
    return f"NVML: {error}"
