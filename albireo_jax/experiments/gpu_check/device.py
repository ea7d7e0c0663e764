"""The device that the check runs on, found without starting JAX on it."""

from albireo_jax.experiments.records import Device, cpu_device
from albireo_jax.experiments.sweep.devices import gpu_device, gpus_here


def device_here(*, on_cpu: bool) -> Device:
    """The CPU, or the first GPU; raises RuntimeError where there is none."""
    if on_cpu:
        return cpu_device()
    gpus = gpus_here()
    if not gpus:
        raise RuntimeError(
            "there is no GPU here: its driver's nvidia-smi finds none; --device cpu goes without"
        )
    return gpu_device(gpus[:1])
