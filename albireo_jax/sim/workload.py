"""Arrivals and lengths of requests: a Poisson process or a trace file, and their replay through a loop."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.sim.lanes import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of a workload before it has tokens.

    The first prompt tokens are those of `block_ids`, each naming `block_size` tokens that are the same
    wherever the id appears; the last block may be cut short.
    """

    arrived_s: float
    input_tokens: int
    output_tokens: int
    block_size: int = 0
    block_ids: tuple[int, ...] = ()


class TimedOutput(NamedTuple):
    """An output and the moment at which its step was committed."""

    moment_s: float
    output: RequestOutput


_COLUMNS = ("arrived_at", "input_tokens", "output_tokens", "block_size", "blocks")


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals of a CSV file: arrived_at (s), input_tokens, output_tokens, block_size, blocks (ids).

    Raises ValueError, naming the file, if it is no such file.
    """
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(f"it has no column {', '.join(missing)}")
            return [_arrival(row) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a trace: {error}") from error


def _arrival(row: Mapping[str, str]) -> Arrival:
    return Arrival(
        arrived_s=float(row["arrived_at"]),
        input_tokens=int(row["input_tokens"]),
        output_tokens=int(row["output_tokens"]),
        block_size=int(row["block_size"]),
        block_ids=tuple(int(block) for block in row["blocks"].split()),
    )


def poisson_arrivals(
    lengths: Sequence[Arrival], *, rate_per_s: float, count: int, seed: int
) -> list[Arrival]:
    """`count` arrivals of a Poisson process, each as long as one of `lengths`, drawn with replacement."""
    random = np.random.default_rng(seed)
    moments = np.cumsum(random.exponential(1 / rate_per_s, count)).tolist()
    drawn = random.integers(len(lengths), size=count).tolist()
    return [replace(lengths[index], arrived_s=moment) for index, moment in zip(drawn, moments, strict=True)]


def scale_lengths(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same arrivals, their prompts, shared blocks and answers `factor` times as long but never empty."""

    def scale(tokens: int) -> int:
        return max(1, round(tokens * factor))

    return [
        replace(
            arrival,
            input_tokens=scale(arrival.input_tokens),
            output_tokens=scale(arrival.output_tokens),
            block_size=scale(arrival.block_size) if arrival.block_size else 0,
        )
        for arrival in arrivals
    ]


def make_requests(arrivals: Sequence[Arrival], *, vocab_size: int, seed: int) -> list[Request]:
    """Greedy requests with random prompts and the lengths of `arrivals`; ids are their indices."""
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=_prompt(arrival, np.random.default_rng((seed, 0, index)), vocab_size, seed=seed),
            max_tokens=arrival.output_tokens,
            arrived_s=arrival.arrived_s,
        )
        for index, arrival in enumerate(arrivals)
    ]


def play(
    loop: EngineLoop, requests: Sequence[Request], *, clock: Clock
) -> Iterator[tuple[float, list[RequestOutput]]]:
    """Add each request at its arrival on the simulated clock and step until all have ended.

    Gives the outputs of each step and the moment at which it was committed. `requests` are in order of
    arrival; `clock` is the one that the loop's executor advances.
    """
    arrived = 0
    while arrived < len(requests) or loop.has_work:
        if not loop.has_work:
            clock.advance_to(requests[arrived].arrived_s)
        while arrived < len(requests) and requests[arrived].arrived_s <= clock():
            loop.scheduler.add(requests[arrived])
            arrived += 1
        outputs = loop.step()
        yield clock(), outputs


def replay(loop: EngineLoop, requests: Sequence[Request], *, clock: Clock) -> list[TimedOutput]:
    """All outputs of `play`, in the order in which they came."""
    return [
        TimedOutput(moment_s, output)
        for moment_s, outputs in play(loop, requests, clock=clock)
        for output in outputs
    ]


def _prompt(arrival: Arrival, random: np.random.Generator, vocab_size: int, *, seed: int) -> Int32s:
    shared = [
        np.random.default_rng((seed, 1, block)).integers(vocab_size, size=arrival.block_size)
        for block in arrival.block_ids
    ]
    own = random.integers(vocab_size, size=arrival.input_tokens)
    return np.concatenate((*shared, own))[: arrival.input_tokens].astype(np.int32)
