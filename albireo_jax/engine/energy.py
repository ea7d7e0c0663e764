"""Energy that the engine's GPUs took, from the counter that NVIDIA's driver keeps for each.

A counter is read when somebody asks, never by the engine's loop. It counts what the whole device takes, in
millijoules since the driver was loaded, idle time and other programs on it included. Where there is none the
reading says why.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_GPU_PLATFORMS = ("gpu", "cuda")
_BUS_ID_BYTES = 32


class Nvml(Protocol):
    """The functions of the module `pynvml` that are used; they raise its `NVMLError`."""

    @property
    def NVMLError(self) -> type[Exception]:  # noqa: N802
        """The driver's error."""
        ...

    def nvmlInit(self) -> None:  # noqa: N802
        """Load the driver's library."""
        ...

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str, /) -> Any:  # noqa: N802
        """The device in that place."""
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
        """Energy between an earlier reading and this one."""
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
        """Energy of the devices since the meter was opened; takes one call of the driver for each device."""
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
    """A meter of JAX's devices of these local numbers; one without joules where they have no counter."""
    if platform not in _GPU_PLATFORMS:
        return NoEnergyMeter(f"devices of the platform {platform} have no energy counter")
    import pynvml  # reads no driver yet, but is not needed without a GPU

    try:
        bus_ids = [_bus_id(ctypes.CDLL("libcuda.so.1"), device_id) for device_id in device_ids]
    except OSError as error:
        return NoEnergyMeter(f"CUDA: {error}")
    return bus_meter(bus_ids, nvml=pynvml)


def bus_meter(bus_ids: Sequence[str], *, nvml: Nvml) -> Meter:
    """A meter over `nvml` of the devices in these places of the PCI bus."""
    try:
        nvml.nvmlInit()
        return EnergyMeter(nvml, [nvml.nvmlDeviceGetHandleByPciBusId(bus_id) for bus_id in bus_ids])
    except nvml.NVMLError as error:
        return NoEnergyMeter(_reason(error))


def _bus_id(cuda: ctypes.CDLL, ordinal: int) -> str:
    """PCI bus id of the device that CUDA gives this number; raises OSError.

    CUDA numbers the devices that the process may see, in an order of its own; NVML all of the machine.
    """
    device, bus_id = ctypes.c_int(), ctypes.create_string_buffer(_BUS_ID_BYTES)
    for call, *arguments in (
        (cuda.cuInit, 0),
        (cuda.cuDeviceGet, ctypes.byref(device), ordinal),
        (cuda.cuDeviceGetPCIBusId, bus_id, _BUS_ID_BYTES, device),
    ):
        if code := call(*arguments):
            raise OSError(f"{call.__name__} for device {ordinal} gave the error {code}")
    return bus_id.value.decode()


def _reason(error: Exception) -> str:
    return f"NVML: {error}"
