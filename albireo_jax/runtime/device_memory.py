"""Memory of the devices: the part that JAX takes at the start, and the part that weights and pages may fill.

`memory_share` means the same wherever it is said, to an engine, a plan or a sweep: the share of all of a
device's memory that an engine fills with what stays, its weights, its pages, and what its slots count. Of the
rest, one half is for what comes and goes with a step, activations and logits; the other is not JAX's, but for
CUDA's context, graphs and libraries, and for other processes::

    0                                        memory_share             pool_share               1
    ├──── weights ────┬──── pages ────┬ slots ┼ activations, logits ┼ CUDA, other processes ┤
    └───────────────── JAX's pool, taken at the start ──────────────┘

By itself JAX takes 75%, and what is not in its pool can never be used. So it is told its share, which must be
before it starts. If it had started, or was given options for its clients, an engine fills the same part of
whatever pool there is: with JAX's own 75%, 71% of the device where `memory_share` is 90%.
"""

from importlib.util import find_spec

import jax
import psutil
from jax.sharding import Mesh

from albireo_jax.core.memory import kept_bytes, pool_share

_HOST_MEMORY_SHARE = 0.25
_MAX_HOST_BYTES = 8 * 2**30


def take_memory(memory_share: float) -> None:
    """Have JAX take what an engine with this share needs of each GPU, unless its clients were given options.

    Must come before the first array; later it changes nothing. It goes before XLA_CLIENT_MEM_FRACTION.
    """
    if _may_find_gpus() and not jax.config.jax_pjrt_client_create_options:
        # As a dictionary: from a string JAX would pass the number on as text, which the client refuses.
        jax.config.update("jax_pjrt_client_create_options", {"memory_fraction": pool_share(memory_share)})


def device_bytes(mesh: Mesh, *, memory_share: float) -> int:
    """Bytes of each GPU, by its pool if that is the share of it that `take_memory` takes; 0 on CPUs."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return 0
    pool_bytes: int = device.memory_stats()["bytes_limit"]
    return int(pool_bytes / pool_share(memory_share))


def budget_bytes(mesh: Mesh, *, memory_share: float) -> int:
    """Bytes of each device for weights, pages and slots; CPU devices divide a part of the host's memory."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        share = int(psutil.virtual_memory().available * _HOST_MEMORY_SHARE)
        return min(share, _MAX_HOST_BYTES) // mesh.size
    pool_bytes: int = device.memory_stats()["bytes_limit"]
    return kept_bytes(pool_bytes, memory_share=memory_share)


def _may_find_gpus() -> bool:
    """Whether JAX's CUDA plugin is there and may be used; no other one knows the option."""
    if jax.config.jax_platforms == "cpu" or find_spec("jax_plugins") is None:
        return False
    return any(find_spec(f"jax_plugins.{name}") is not None for name in ("xla_cuda12", "xla_cuda13"))
