"""GPUs that a plan can be made for: data sheets, not measurements."""

from dataclasses import dataclass

from albireo_jax.sim.links import NVLINK_3, NVLINK_4, NVLINK_5, PCIE_4, Links


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A kind of GPU: its memory, what it can do at most, and how it is joined to others of its kind.

    `flops_per_s` are of dense bfloat16 products, `bytes_per_s` those of its memory.
    """

    name: str
    title: str
    memory_bytes: int
    flops_per_s: float
    bytes_per_s: float
    links: Links


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            title="NVIDIA H100 SXM 80 GB",
            memory_bytes=80 * 10**9,
            flops_per_s=989e12,
            bytes_per_s=3.35e12,
            links=NVLINK_4,
        ),
        Gpu(
            name="h200",
            title="NVIDIA H200 SXM 141 GB",
            memory_bytes=141 * 10**9,
            flops_per_s=989e12,
            bytes_per_s=4.8e12,
            links=NVLINK_4,
        ),
        Gpu(
            name="b200",
            title="NVIDIA B200 SXM 180 GB",
            memory_bytes=180 * 10**9,
            flops_per_s=2250e12,
            bytes_per_s=7.7e12,
            links=NVLINK_5,
        ),
        Gpu(
            name="a100",
            title="NVIDIA A100 SXM 80 GB",
            memory_bytes=80 * 10**9,
            flops_per_s=312e12,
            bytes_per_s=2.039e12,
            links=NVLINK_3,
        ),
        Gpu(
            name="a100-pcie",
            title="NVIDIA A100 PCIe 80 GB",
            memory_bytes=80 * 10**9,
            flops_per_s=312e12,
            bytes_per_s=1.935e12,
            links=PCIE_4,
        ),
    )
}
"""By name, from NVIDIA's data sheets: nvidia.com/en-us/data-center/h100, /h200, /dgx-b200 and /a100."""


def find_gpu(name: str) -> Gpu:
    """The GPU of this name; raises ValueError with the names there are."""
    if name not in GPUS:
        raise ValueError(f"gpu {name!r} is not known; known are {', '.join(GPUS)}")
    return GPUS[name]
