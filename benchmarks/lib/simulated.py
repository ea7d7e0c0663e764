"""What the records of simulated experiments have in common."""

from albireo_jax.measure.records import Device
from albireo_jax.sim.gpus import Gpu

NOT_MEASURED = "Simulated (roofline): the shipped scheduler on a clock. Nothing was measured on a GPU."
"""For the note of every such record; their names begin with `simulated-`."""


def simulated_gpus(gpu: Gpu, count: int) -> Device:
    """GPUs that nobody had."""
    return Device(
        kind="simulated", name=gpu.name, count=count, memory_bytes=gpu.memory_bytes, detail=gpu.title
    )
