"""The costs of each way to sample, for a rank, and its time over virtual devices, recorded.

Every route samples rows that it serves, beside the routes that serve them as well: greedy ones, ones with a
temperature alone, and ones with top-p whose candidates suffice, or all but one row's. Operations and bytes
are of the compiled programs. How often loops turn and which branches are taken depends on the rows, so a
program is run once under a profiler: costs are those of each instruction times its runs in the trace. The
times are of the CPU's cores taking turns as the devices: they compare the work of all ranks together, and say
nothing of a link between real ones.

    python -m benchmarks.route_costs --rows 128 --vocab 151936 --ranks 8
"""

import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Float

from albireo_jax.measure.records import Series, cpu_device, series_by_metric
from albireo_jax.sampling.filters import SamplerParams
from albireo_jax.sampling.routes import Route, sample_by
from benchmarks.lib.hlo import parse
from benchmarks.lib.hlo_collectives import collectives
from benchmarks.lib.hlo_operations import operations
from benchmarks.lib.recording import Recording, script_parser
from benchmarks.lib.xla_trace import traced_events

NOTE = (
    "Per rank: operations on elements (TopK calls are not counted), bytes of the results of the collectives "
    "that ran, and of those that the program has for other rows. The devices are virtual: times "
    "are of one CPU doing the work of all ranks, not of parallel ranks or of a link between them."
)

_AXIS = "tp"
_BY_VOCAB, _EVERYWHERE = PartitionSpec(None, _AXIS), PartitionSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRows:
    """Rows to sample, laid out over the ranks."""

    logits_RV: Float[Array, "R V"]
    params: SamplerParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCost:
    """Mean over the ranks of one execution.

    `moved_bytes` are of the collectives that ran; `unmoved_bytes` of those that the program has for rows
    other than these, each once.
    """

    operations: float
    moved_bytes: float
    unmoved_bytes: int


def ranks_mesh(ranks: int) -> Mesh:
    """One rank on each of the first devices."""
    return Mesh(np.array(jax.devices()[:ranks]), (_AXIS,), axis_types=(AxisType.Auto,))


def peaked_batch(
    mesh: Mesh, *, rows: int, vocab: int, temperature: float, top_p: float = 1.0, flat_rows: int = 0
) -> RouteRows:
    """Normal logits with standard deviations from 5 to 8 (the first rows' are 0.1), one seed per row.

    At temperature 0.8, these leave few tokens in a nucleus of 0.9, and the flat ones most of the vocabulary.
    """
    spread_R = np.linspace(5, 8, rows, dtype=np.float32)
    spread_R[:flat_rows] = 0.1
    logits_RV = np.random.default_rng(0).standard_normal((rows, vocab), np.float32) * spread_R[:, None]
    params = SamplerParams(
        temperature_R=jnp.full(rows, temperature, jnp.float32),
        top_k_R=jnp.zeros(rows, jnp.int32),
        top_p_R=jnp.full(rows, top_p, jnp.float32),
        min_p_R=jnp.zeros(rows, jnp.float32),
        seed_R2=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1),
        position_R=jnp.full(rows, 100, jnp.int32),
    )
    return RouteRows(
        logits_RV=jax.device_put(logits_RV, NamedSharding(mesh, _BY_VOCAB)),
        params=jax.device_put(params, NamedSharding(mesh, _EVERYWHERE)),
    )


def compile_route(route: Route, batch: RouteRows, mesh: Mesh) -> Compiled:
    """The program that samples batches of this shape; it is called with logits and parameters."""
    stage = jax.shard_map(
        partial(sample_by, route, axis=_AXIS),
        mesh=mesh,
        in_specs=(_BY_VOCAB, _EVERYWHERE),
        out_specs=_EVERYWHERE,
        check_vma=False,
    )
    return jax.jit(stage).lower(batch.logits_RV, batch.params).compile()


def route_cost(compiled: Compiled, batch: RouteRows) -> RouteCost:
    """The costs of the program on each rank for these rows, on CPU devices only.

    Raises RuntimeError if the trace lacks a collective that must have run on every rank.
    """
    program = parse(compiled.as_text() or "")
    runs = count_runs(lambda: compiled(batch.logits_RV, batch.params))
    ranks = len(batch.logits_RV.sharding.device_set)
    sent = collectives(program)
    for one in sent:
        if not one.within and runs[one.name] != ranks:
            raise RuntimeError(
                f"{one.name} runs once on each of {ranks} ranks, but {runs[one.name]} times in the trace"
            )
    return RouteCost(
        operations=operations(program, runs) / ranks,
        moved_bytes=sum(one.result_bytes * runs[one.name] for one in sent) / ranks,
        unmoved_bytes=sum(one.result_bytes for one in sent if runs[one.name] == 0),
    )


def count_runs(execute: Callable[[], object]) -> Counter[str]:
    """Runs of each instruction by name, on all devices together, while `execute` computes its result.

    Instructions inside of loops and of the branches that are taken have their own counts; parts of a fusion
    have none. Only instructions of one program may run, since names tell no programs apart.
    """
    return Counter(event.name for event in traced_events(execute))


class RowKind(NamedTuple):
    """A kind of row, and the cheapest route that serves it; so do all that follow it."""

    cheapest: Route
    temperature: float
    top_p: float = 1.0
    flat_rows: int = 0


CASES = {
    "greedy": RowKind(Route.GREEDY, 0.0),
    "temperature 0.8": RowKind(Route.UNFILTERED, 0.8),
    "top-p 0.9": RowKind(Route.CANDIDATES, 0.8, top_p=0.9),
    "top-p 0.9, one row flat": RowKind(Route.CANDIDATES, 0.8, top_p=0.9, flat_rows=1),
}


class RouteCase(NamedTuple):
    """A route and the rows that it samples."""

    case: str
    route: Route


def subjects() -> list[RouteCase]:
    """Each kind of row with its own route, all-to-all and replicated."""
    general = (Route.ALL_TO_ALL, Route.REPLICATED)
    return [RouteCase(case, route) for case, rows in CASES.items() for route in (rows.cheapest, *general)]


def batches(options: Namespace, mesh: Mesh) -> dict[str, RouteRows]:
    return {
        case: peaked_batch(
            mesh,
            rows=options.rows,
            vocab=options.vocab,
            temperature=rows.temperature,
            top_p=rows.top_p,
            flat_rows=rows.flat_rows,
        )
        for case, rows in CASES.items()
    }


def times_ms(
    programs: dict[Route, Compiled], batch_of: dict[str, RouteRows], repeats: int
) -> dict[RouteCase, list[float]]:
    """Wall clock of each subject, in turns; the first turn is dropped.

    Of two executions in a row the second counts: the first also waits for the memory of the subject before.
    """
    samples: dict[RouteCase, list[float]] = {subject: [] for subject in subjects()}
    for turn in range(repeats + 1):
        for subject, taken in samples.items():
            batch = batch_of[subject.case]
            taken_ms = [_execution_ms(programs[subject.route], batch) for _ in range(2)]
            if turn:
                taken.append(taken_ms[1])
    return samples


def _execution_ms(program: Compiled, batch: RouteRows) -> float:
    started_s = time.perf_counter()
    jax.block_until_ready(program(batch.logits_RV, batch.params))
    return 1000 * (time.perf_counter() - started_s)


def series_of(subject: RouteCase, cost: RouteCost, taken_ms: list[float]) -> list[Series]:
    metrics = {
        ("operations", "operations/rank"): [cost.operations],
        ("moved", "bytes/rank"): [cost.moved_bytes],
        ("not moved", "bytes/rank"): [cost.unmoved_bytes],
        ("wall", "ms"): taken_ms,
    }
    return series_by_metric(subject.route.name, subject.case, metrics)


def render(costs: dict[RouteCase, RouteCost], taken: dict[RouteCase, list[float]]) -> str:
    """Each subject, and its share of the replicated route's operations and time and of all-to-all's bytes."""
    lines: list[str] = []
    for subject, cost in costs.items():
        replicated, all_to_all = (
            RouteCase(subject.case, route) for route in (Route.REPLICATED, Route.ALL_TO_ALL)
        )
        ms = statistics.median(taken[subject])
        computed = cost.operations / costs[replicated].operations
        moved = cost.moved_bytes / costs[all_to_all].moved_bytes
        lines.append(
            f"{subject.case:24} {subject.route.name:12} "
            f"{cost.operations / 1e6:9.2f} M operations, {computed:7.4f} of replicated; "
            f"{cost.moved_bytes:12,.0f} bytes, {moved:8.5f} of all-to-all; {cost.unmoved_bytes:11,} not; "
            f"{ms:8.1f} ms, {ms / statistics.median(taken[replicated]):6.3f} of replicated"
        )
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    recording = Recording.begin(parser)
    options = recording.options
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.ranks)
    mesh = ranks_mesh(options.ranks)
    batch_of = batches(options, mesh)
    programs = {route: compile_route(route, batch_of["greedy"], mesh) for route in Route}
    taken = times_ms(programs, batch_of, options.repeats)
    costs = {subject: route_cost(programs[subject.route], batch_of[subject.case]) for subject in subjects()}
    print(render(costs, taken))
    recording.write(
        "routes",
        [one for subject, cost in costs.items() for one in series_of(subject, cost, taken[subject])],
        note=NOTE,
        device=cpu_device(virtual_devices=options.ranks),
    )


if __name__ == "__main__":
    main()
