"""Memory of devices: what JAX is told, what is divided, and what a second copy of the layers holds."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from albireo_jax.core.config import (
    CacheConfig,
    Dtype,
    EngineConfig,
    Quantization,
    SchedulerConfig,
)
from albireo_jax.core.memory import layer_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.launch import prepare_random
from albireo_jax.models.registry import random_model
from albireo_jax.nn.decoder import unstack
from albireo_jax.nn.sharding import make_mesh
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.device_memory import budget_bytes

TELL = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
from albireo_jax.runtime.device_memory import take_memory
if sys.argv[2]:
    jax.config.update("jax_platforms", sys.argv[2])
for share in (0.9, 0.5):
    take_memory(share)
    print(jax.config.jax_pjrt_client_create_options)
"""


def told(folder: Path, *, platforms: str) -> list[str]:
    """What JAX's clients were told after each of two shares, in a process whose JAX has not started."""
    command = [sys.executable, "-c", TELL, str(folder), platforms]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_gpus_are_told_their_pool_once_and_nothing_else_is(tmp_path: Path) -> None:
    plugin = tmp_path / "jax_plugins" / "xla_cuda13"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    assert told(tmp_path, platforms="cuda,cpu") == ["{'memory_fraction': 0.95}"] * 2
    assert told(tmp_path, platforms="cpu") == ["None"] * 2


def test_cpu_devices_divide_the_memory_of_their_host() -> None:
    one, eight = (budget_bytes(make_mesh(tp), memory_share=0.9) for tp in (1, 8))
    assert 0 < one <= 8 * 2**30
    assert eight == pytest.approx(one / 8, rel=0.1)


@pytest.mark.parametrize("quantization", [None, Quantization.INT8])
def test_a_second_copy_of_the_layers_holds_the_bytes_that_are_counted(
    shape: ModelConfig, quantization: Quantization | None
) -> None:
    model = replace(shape, quantization=quantization)
    weights = random_model(model, dtype=Dtype.BFLOAT16, mesh=make_mesh(2), seed=0).weights()
    stacked = {id(array) for array in jax.tree.leaves(weights)}
    copied = [array for array in jax.tree.leaves(unstack(weights)) if id(array) not in stacked]
    held = sum(array.addressable_shards[0].data.nbytes for array in copied)
    assert held == layer_bytes(model, tp=2, dtype=Dtype.BFLOAT16)


def test_pages_take_their_memory_once_all_programs_are_compiled(shape: ModelConfig) -> None:
    pool = (shape.num_layers, 78, 16, shape.num_kv_heads, shape.head_dim)
    config = EngineConfig(
        model="random",
        max_logprobs=0,
        cache=CacheConfig(num_pages=pool[1] - 1),
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=32),
    )
    seen: list[int] = []

    def count(done: int, total: int) -> None:
        del done, total
        seen.append(sum(array.shape == pool for array in jax.live_arrays()))

    ready = prepare_random(config, shape, buckets=(Bucket(4, 4), Bucket(32, 4)), progress=count)
    assert len(seen) > 5
    assert not any(seen)
    assert sum(array.shape == pool for array in jax.live_arrays()) == 2
    assert ready.memory.num_pages == pool[1] - 1
