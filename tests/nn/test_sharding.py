"""Axis letters decide shapes and shardings; a mesh wants enough devices."""

import math

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from albireo_jax.core.config import Dtype
from albireo_jax.core.memory import weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import axes_of, logical_axes
from albireo_jax.nn.shapes import axis_sizes, weight_names, weight_shapes
from albireo_jax.nn.sharding import make_mesh, named_sharding, partition_spec


def test_the_suffix_of_a_name_is_its_axes() -> None:
    assert axes_of("w_gate_up_LD2F") == "LD2F"
    assert logical_axes("wo_LJKD") == ("layers", "query_heads", "head", "model")
    for name in ("weight", "w_", "w_LDQ", ""):
        with pytest.raises(ValueError, match="does not end in axis letters"):
            axes_of(name)


def test_heads_feed_forward_and_vocabulary_are_split() -> None:
    assert partition_spec("wqkv_LDNXK") == P(None, None, "tp", None, None)
    assert partition_spec("w_down_LFD") == P(None, "tp", None)
    assert partition_spec("embed_VD") == P("tp", None)
    assert partition_spec("final_norm_D") == P(None)


def test_a_mesh_takes_the_first_devices_and_counts_them() -> None:
    mesh = make_mesh(4)
    assert list(mesh.devices) == jax.devices()[:4]
    assert mesh.axis_types == (AxisType.Auto,)
    assert named_sharding(mesh, "w_down_LFD").shard_shape((2, 8, 3)) == (2, 2, 3)
    with pytest.raises(ValueError, match=r"tp 16 needs 16 devices, there are 8 \(cpu\)"):
        make_mesh(16)


def test_degrees_beyond_the_key_value_heads_replicate_them(everything: ModelConfig) -> None:
    sizes = {tp: axis_sizes(everything, tp) for tp in (1, 2, 4, 8)}
    assert [(sizes[tp]["N"], sizes[tp]["G"], sizes[tp]["V"]) for tp in sizes] == [
        (2, 4, 101),
        (2, 4, 102),
        (4, 2, 104),
        (8, 1, 104),
    ]
    with pytest.raises(ValueError, match=r"tp 3 does not divide .*possible: \[1, 2, 4, 8\]"):
        axis_sizes(everything, 3)


def test_optional_weights_are_there_only_in_models_that_have_them(
    llama: ModelConfig, everything: ModelConfig
) -> None:
    optional = {"bqkv_LNXK", "q_norm_LK", "k_norm_LK", "lm_head_VD"}
    assert set(weight_names(everything)) - set(weight_names(llama)) == optional


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_take_the_bytes_that_the_memory_plan_counts(everything: ModelConfig, tp: int) -> None:
    mesh = make_mesh(tp)
    elements = sum(
        math.prod(named_sharding(mesh, name).shard_shape(shape))
        for name, shape in weight_shapes(everything, tp).items()
    )
    assert elements * 4 == weight_bytes(everything, tp=tp, dtype=Dtype.FLOAT32)
