"""Routes of sampling, compiled over virtual devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from albireo_jax.sampling.routes import Route, sample_by
from tests.labs.sampling_lab import params_of, random_batch

ROWS = 61  # which divides no number of ranks


def lowered(route, ranks, columns):
    """A route over `ranks` virtual devices, logits split over the vocabulary."""
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",), axis_types=(AxisType.Auto,))
    by_vocab, everywhere = PartitionSpec(None, "tp"), PartitionSpec()
    stage = jax.shard_map(
        partial(sample_by, route, axis="tp"),
        mesh=mesh,
        in_specs=(by_vocab, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    shardings = NamedSharding(mesh, by_vocab), NamedSharding(mesh, everywhere)
    logits, params = random_batch(0, ROWS, columns)
    return jax.jit(stage, in_shardings=shardings).lower(jnp.asarray(logits), params_of(params))


@cache
def compiled(route, ranks, columns):
    return lowered(route, ranks, columns).compile()


def served_by(route, row):
    """The row, without what the route does not serve."""
    if route is Route.GREEDY:
        return row._replace(temperature=0.0)
    if route is Route.UNFILTERED:
        return row._replace(top_k=0, top_p=1.0, min_p=0.0)
    return row
