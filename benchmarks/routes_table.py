"""What each way to sample costs a rank, and how long it takes over virtual devices, recorded.

Every route samples rows that it serves, beside the routes that serve them as well: greedy ones, ones with a
temperature alone, and ones with top-p whose candidates suffice, or all but one row's. Operations and
bytes are of the compiled programs, by a trace of one execution (`benchmarks.lib.route_costs`).
The times are of the CPU's cores taking turns as the devices: they compare the work of all ranks
together, and say nothing of a link between real ones.

    python benchmarks/routes_table.py --rows 128 --vocab 151936 --ranks 8
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.sampling.routes import Route
from benchmarks.lib.route_costs import (
    Batch,
    RouteCost,
    compile_route,
    peaked_batch,
    ranks_mesh,
    route_cost,
)

ROOT = Path(__file__).resolve().parents[1]
NOTE = (
    "Per rank: operations on elements (TopK calls are not counted), bytes of the results of the collectives "
    "that ran, and of those that the program has for other rows. The devices are virtual: times "
    "are of one CPU doing the work of all ranks, not of parallel ranks or of a link between them."
)


class Rows(NamedTuple):
    """A kind of row, and the cheapest route that serves it; so do all that follow it."""

    cheapest: Route
    temperature: float
    top_p: float = 1.0
    flat_rows: int = 0


CASES = {
    "greedy": Rows(Route.GREEDY, 0.0),
    "temperature 0.8": Rows(Route.UNFILTERED, 0.8),
    "top-p 0.9": Rows(Route.CANDIDATES, 0.8, top_p=0.9),
    "top-p 0.9, one row flat": Rows(Route.CANDIDATES, 0.8, top_p=0.9, flat_rows=1),
}


class Subject(NamedTuple):
    """A route and the rows that it samples."""

    case: str
    route: Route


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def subjects() -> list[Subject]:
    """Each kind of row with its own route, all-to-all and replicated."""
    general = (Route.ALL_TO_ALL, Route.REPLICATED)
    return [Subject(case, route) for case, rows in CASES.items() for route in (rows.cheapest, *general)]


def batches(options: argparse.Namespace, mesh: Mesh) -> dict[str, Batch]:
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
    programs: dict[Route, Compiled], batch_of: dict[str, Batch], repeats: int
) -> dict[Subject, list[float]]:
    """Wall clock of each subject, in turns; the first turn is dropped.

    Of two executions in a row the second counts: the first also waits for the memory of the subject before.
    """
    samples: dict[Subject, list[float]] = {subject: [] for subject in subjects()}
    for turn in range(repeats + 1):
        for subject, taken in samples.items():
            batch = batch_of[subject.case]
            for _ in range(2):
                started_s = time.perf_counter()
                jax.block_until_ready(programs[subject.route](batch.logits_RV, batch.params))
                taken_ms = 1000 * (time.perf_counter() - started_s)
            if turn:
                taken.append(taken_ms)
    return samples


def series_of(subject: Subject, cost: RouteCost, taken_ms: list[float]) -> list[Series]:
    metrics = {
        ("operations", "operations/rank"): (cost.operations,),
        ("moved", "bytes/rank"): (cost.moved_bytes,),
        ("not moved", "bytes/rank"): (float(cost.unmoved_bytes),),
        ("wall", "ms"): tuple(taken_ms),
    }
    return [
        Series(subject=subject.route.name, case=subject.case, metric=metric, unit=unit, samples=samples)
        for (metric, unit), samples in metrics.items()
    ]


def render(costs: dict[Subject, RouteCost], taken: dict[Subject, list[float]]) -> str:
    """Each subject, and its share of the replicated route's operations and time and of all-to-all's bytes."""
    lines: list[str] = []
    for subject, cost in costs.items():
        replicated, all_to_all = (
            Subject(subject.case, route) for route in (Route.REPLICATED, Route.ALL_TO_ALL)
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
    options = arguments()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.ranks)
    load_before = os.getloadavg()[0]
    mesh = ranks_mesh(options.ranks)
    batch_of = batches(options, mesh)
    programs = {route: compile_route(route, batch_of["greedy"], mesh) for route in Route}
    taken = times_ms(programs, batch_of, options.repeats)
    costs = {subject: route_cost(programs[subject.route], batch_of[subject.case]) for subject in subjects()}
    print(render(costs, taken))
    record = Record(
        name="routes",
        device=cpu_device(virtual_devices=options.ranks),
        settings={name: value for name, value in vars(options).items() if name != "output"},
        series=[one for subject in subjects() for one in series_of(subject, costs[subject], taken[subject])],
        note=NOTE,
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
