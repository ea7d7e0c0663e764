"""The process that measures one replica: `python -m albireo_jax.sweep.replica_worker`.

One JSON object a line, standard input to standard output::

    sweep   job ─────────────────────▶  ◀──── ready: sizes of the engine     worker, compiled and waiting
            {variant, seed} ────────▶  ◀──── the run
            {variant, seed} ────────▶  ◀──── the run                        ... the sweep closes the input

So the sweep says when a run starts, and the replicas of a case start together. Everything else, what
libraries print included, goes to standard error. A worker ends at once when its input does: no run goes on
for a sweep that was killed.
"""

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from albireo_jax.core.config import Dtype, SamplingMode
from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.measure.loads import deal, sampled_requests
from albireo_jax.measure.worker_channel import WorkerChannel
from albireo_jax.sim.workload import Arrival
from albireo_jax.sweep.cases import SweepCase
from albireo_jax.sweep.sweep_settings import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaJob:
    """A worker's job: replica number `replica` of a case, on `gpus` of the machine (none: virtual devices).

    `arrivals` are those of the whole cluster; the worker takes its share, so that the prompts are the same at
    every degree.
    """

    model: str
    dtype: Dtype
    case: SweepCase
    replica: int
    gpus: tuple[int, ...]
    arrivals: tuple[Arrival, ...]
    temperature: float
    top_p: float


def serve(job: ReplicaJob, commands: "queue.Queue[dict[str, Any]]", channel: WorkerChannel) -> None:
    """Prepare the engines of `job`, say so, and answer commands for ever."""
    # Imported here, since it imports JAX: whoever makes a job needs none.
    from albireo_jax.launch import Prepared, prepare
    from albireo_jax.sweep.variant_engines import VariantEngines

    case = job.case

    def prepared(sampling: SamplingMode) -> Prepared:
        return prepare(case.engine_config(job.model, sampling, dtype=job.dtype), measure_sampling=True)

    engines = VariantEngines(case.variants, prepared, tp=case.tp)
    channel.send(asdict(engines.sizes))
    while True:
        command = commands.get()
        requests = sampled_requests(
            job.arrivals,
            vocab_size=engines.sizes.vocab_size,
            seed=command["seed"],
            temperature=job.temperature,
            top_p=job.top_p,
        )
        share = deal(requests, case.num_replicas)[job.replica]
        channel.send(asdict(engines.run(Variant(command["variant"]), share)))


def main() -> None:
    """Serve the job on standard input."""
    channel = WorkerChannel()
    lines = channel.questions()
    job = dataclass_from_json(ReplicaJob, next(lines))
    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(lines, commands), daemon=True).start()
    serve(job, commands, channel)


def _read(lines: Iterator[dict[str, Any]], commands: "queue.Queue[dict[str, Any]]") -> None:
    """Pass on commands until there are no more, which ends the process whatever it does."""
    for command in lines:
        commands.put(command)
    os._exit(0)


if __name__ == "__main__":
    main()
