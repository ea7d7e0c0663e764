"""Joules are those of the engine's devices and of nothing else; whatever stands in the way is told."""

import pynvml
import pytest

from albireo_jax.engine.energy import EnergyReading, Nvml, bus_meter, open_meter

PLACES = ["0000:1B:00.0", "0000:43:00.0", "0000:9D:00.0", "0001:1B:00.0"]


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

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str, /) -> int:  # noqa: N802
        self._answer("bus")
        return PLACES.index(bus_id)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int, /) -> int:  # noqa: N802
        self._answer("energy")
        self.reads += 1
        return self.millijoules[handle]


def test_joules_are_those_since_the_meter_was_opened_over_its_devices_alone() -> None:
    driver = Driver()
    meter = bus_meter([PLACES[2], PLACES[1]], nvml=driver)
    assert meter.read() == EnergyReading(joules=0.0)
    for index, taken in enumerate((7_000_000, 500, 1_500, 9_000_000)):
        driver.millijoules[index] += taken
    first = meter.read()
    assert first == EnergyReading(joules=2.0)
    driver.millijoules[2] += 250
    assert meter.read().since(first) == EnergyReading(joules=0.25)


@pytest.mark.parametrize("call", ["init", "bus", "energy"])
def test_what_the_driver_refuses_is_the_reason(call: str) -> None:
    reading = bus_meter(PLACES[:1], nvml=Driver(fails=call)).read()
    assert reading == EnergyReading(joules=None, reason=f"NVML: {call} is not supported")


def test_a_counter_that_fails_later_or_begins_again_gives_a_reason_and_may_recover() -> None:
    driver = Driver()
    meter = bus_meter([PLACES[2]], nvml=driver)
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


def test_an_error_that_is_not_the_drivers_is_not_swallowed() -> None:
    with pytest.raises(ValueError, match="not in list"):
        bus_meter(["0000:00:00.0"], nvml=Driver())


def test_the_counter_is_read_on_demand_only() -> None:
    driver = Driver()
    meter = bus_meter(PLACES[:2], nvml=driver)
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
