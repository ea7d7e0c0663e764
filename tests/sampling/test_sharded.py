import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sampling_lab import INF, noise_of, oracle, params_of, random_batch

from albireo_jax.sampling.sharded import sample_all_to_all, sample_replicated

ROWS, VOCAB, TOKENS = 13, 1016, 1013  # 13 rows divide no number of ranks, 3 ids only pad the vocabulary
KINDS = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(")


class Collective(NamedTuple):
    kind: str
    shape: str


@cache
def compiled(route, ranks):
    """A route of `ranks` virtual devices, logits split over the vocabulary."""
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",), axis_types=(AxisType.Auto,))
    by_vocab = PartitionSpec(None, "tp")
    stage = jax.shard_map(
        partial(route, axis="tp"),
        mesh=mesh,
        in_specs=(by_vocab, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    shardings = NamedSharding(mesh, by_vocab), NamedSharding(mesh, PartitionSpec())
    logits, params = random_batch(0, ROWS, VOCAB)
    return jax.jit(stage, in_shardings=shardings).lower(jnp.asarray(logits), params_of(params)).compile()


def collectives(program):
    return [
        Collective(kind, shape.partition("{")[0]) for shape, kind in COLLECTIVE.findall(program.as_text())
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_route_and_degree_gives_the_same_ids(ranks):
    sharded, replicated = compiled(sample_all_to_all, ranks), compiled(sample_replicated, ranks)
    for seed in range(20):
        logits, params = random_batch(seed, ROWS, VOCAB)
        logits[:, TOKENS:] = -INF
        want = [oracle(*each) for each in zip(logits, params, noise_of(params, VOCAB), strict=True)]
        for program in (sharded, replicated):
            np.testing.assert_array_equal(program(logits, params_of(params)), want)


@pytest.mark.parametrize("ranks", [2, 8])
def test_sharded_moves_the_logits_once_and_gathers_only_ids(ranks):
    found = collectives(compiled(sample_all_to_all, ranks))
    own_rows = -(-ROWS // ranks)
    assert sorted(one.kind for one in found) == ["all-gather", "all-to-all"]
    by_kind = {one.kind: one.shape for one in found}
    assert by_kind["all-gather"] == f"s32[{own_rows * ranks}]"


def test_replicated_gathers_the_logits_and_one_rank_needs_nothing():
    assert collectives(compiled(sample_replicated, 2)) == [("all-gather", f"f32[{ROWS},{VOCAB}]")]
    for route in (sample_all_to_all, sample_replicated):
        assert collectives(compiled(route, 1)) == []
