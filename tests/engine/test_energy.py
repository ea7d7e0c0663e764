"""Joules are those of the engine's devices and of nothing else; whatever stands in the way is told."""

import pynvml
import pytest

from albireo_jax.engine.energy import EnergyReading, Nvml, gpu_meter, open_meter


class DriverError(Exception):
    pass


class Driver:
    """The calls of NVML that are used, on a machine of four GPUs; `fails` names a call that is refused."""

    NVMLError = DriverError

    def __init__(self, *, fails: str = "") -> None:
        self.fails = fails
        self.millijoules = {0: 1_000, 1: 20_000, 2: 300_000, 3: 4_000_000}
        self.reads = 0

    def _answer(self, call: str) -> None:
        if call == self.fails:
            raise DriverError(f"{call} is not supported")

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init")

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> int:  # noqa: N802
        self._answer("index")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> int:  # noqa: N802
        self._answer("uuid")
        return {"GPU-a": 0, "GPU-b": 1, "GPU-c": 2, "GPU-d": 3}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int, /) -> int:  # noqa: N802
        self._answer("energy")
        self.reads += 1
        return self.millijoules[handle]


def test_joules_are_those_since_the_meter_was_opened_over_its_devices_alone() -> None:
    driver = Driver()
    meter = gpu_meter([1, 2], nvml=driver, visible=None)
    assert meter.read() == EnergyReading(joules=0.0)
    for index, taken in enumerate((7_000_000, 500, 1_500, 9_000_000)):
        driver.millijoules[index] += taken
    first = meter.read()
    assert first == EnergyReading(joules=2.0)
    driver.millijoules[2] += 250
    assert meter.read().since(first) == EnergyReading(joules=0.25)


@pytest.mark.parametrize(
    ("visible", "ids", "read"),
    [("3,1", [0], [3]), (" 2 , 0 ", [1], [0]), ("GPU-c,GPU-b", [0, 1], [2, 1]), (None, [3], [3])],
)
def test_devices_are_those_that_are_visible_in_their_order(
    visible: str | None, ids: list[int], read: list[int]
) -> None:
    driver = Driver()
    meter = gpu_meter(ids, nvml=driver, visible=visible)
    for index in range(4):
        driver.millijoules[index] += 1_000 * 10**index
    assert meter.read().joules == sum(10**index for index in read)


@pytest.mark.parametrize("call", ["init", "index", "uuid", "energy"])
def test_what_the_driver_refuses_is_the_reason(call: str) -> None:
    visible = "GPU-a" if call == "uuid" else None
    reading = gpu_meter([0], nvml=Driver(fails=call), visible=visible).read()
    assert reading == EnergyReading(joules=None, reason=f"NVML: {call} is not supported")


def test_a_counter_that_fails_later_or_begins_again_gives_a_reason_and_may_recover() -> None:
    driver = Driver()
    meter = gpu_meter([2], nvml=driver, visible=None)
    driver.millijoules[2] += 5_000
    driver.fails = "energy"
    lost = meter.read()
    assert lost == EnergyReading(joules=None, reason="NVML: energy is not supported")
    driver.fails = ""
    assert meter.read() == EnergyReading(joules=5.0)
    assert meter.read().since(lost) == EnergyReading(joules=None, reason=lost.reason)
    driver.millijoules[2] = 3
    assert meter.read().joules is None
    assert "driver was reloaded" in meter.read().reason


def test_a_device_that_is_not_visible_is_no_guess() -> None:
    reading = gpu_meter([1], nvml=Driver(), visible="0").read()
    assert reading.joules is None
    assert "device 1 is not among those of CUDA_VISIBLE_DEVICES=0" in reading.reason


def test_an_error_that_is_not_the_drivers_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        gpu_meter([0], nvml=Driver(), visible="GPU-unknown")


def test_the_counter_is_read_on_demand_only() -> None:
    driver = Driver()
    meter = gpu_meter([0, 1], nvml=driver, visible=None)
    opened = driver.reads
    meter.read()
    assert driver.reads == opened + 2


def test_a_cpu_has_no_counter() -> None:
    reading = open_meter([0, 1], platform="cpu").read()
    assert reading == EnergyReading(joules=None, reason="devices of the platform cpu have no energy counter")


def test_the_real_module_has_what_is_used_and_its_absence_on_a_machine_is_a_reason() -> None:
    nvml: Nvml = pynvml
    assert issubclass(nvml.NVMLError, Exception)
    reading = open_meter([0], platform="gpu").read()
    assert (reading.joules is None) == bool(reading.reason)
