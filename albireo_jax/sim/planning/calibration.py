"""Measured step times and host times of an engine, and what they say of any other step.

A step's device time is that of its bucket, the padded sizes that were compiled, and so much for each *pair*
of a query and a cached token that it sees: one rate for rows that compute one token, one for prompt chunks.
The host's tasks take a fixed time, so much a row, and so much a token (`sim.host`). Both are fitted for a
depth of the loop, because host and device disturb each other differently where they overlap.

`albireo calibrate` measures an engine and writes the file that `read_calibration` reads. Nothing
here needs a device.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.host import HostTerms

FORMAT = 1
"""Of the file; another number is refused."""


class StepSize(NamedTuple):
    """The sizes that decide the time of a step.

    `is_decode`: each row computes one token and none is new. `row_pairs` and `chunk_pairs` count the pairs
    of queries and cached tokens that they see, of rows with one token and of prompt chunks.
    """

    tokens: int
    rows: int
    is_decode: bool
    row_pairs: int
    chunk_pairs: int
    sampled: int


def step_size(plan: StepPlan) -> StepSize:
    """The size of a step."""
    starts, counts = plan.starts.astype(np.int64), plan.counts.astype(np.int64)
    pairs = counts * starts + counts * (counts + 1) // 2
    row_pairs = int(pairs[counts == 1].sum())
    return StepSize(
        tokens=plan.num_tokens,
        rows=plan.num_rows,
        is_decode=plan.num_tokens == plan.num_rows and not plan.new_slots,
        row_pairs=row_pairs,
        chunk_pairs=int(pairs.sum()) - row_pairs,
        sampled=int(plan.samples.sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketTerms:
    """Seconds of a step padded to so many tokens and rows, without its pairs; from so many `samples`.

    As many tokens as rows are a decode step. Without samples the seconds are interpolated.
    """

    tokens: int
    rows: int
    step_s: float
    samples: int

    @property
    def is_decode(self) -> bool:
        """Whether it holds decode steps, and no others."""
        return self.tokens == self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """Device seconds of steps: by bucket, smallest first, and by pair; the forward pass without sampling."""

    buckets: tuple[BucketTerms, ...]
    row_pair_s: float
    chunk_pair_s: float

    def bucket(self, size: StepSize) -> BucketTerms:
        """The bucket that a step is padded to; raises ValueError if it fits none."""
        for bucket in self.buckets:
            fits = bucket.rows >= size.rows and bucket.tokens >= size.tokens
            if fits and bucket.is_decode == size.is_decode:
                return bucket
        raise ValueError(
            f"a step of {size.tokens} tokens and {size.rows} rows is larger than those measured, of at most "
            f"{max(bucket.tokens for bucket in self.buckets)} tokens and "
            f"{max(bucket.rows for bucket in self.buckets)} rows"
        )

    def seconds(self, size: StepSize) -> float:
        """Seconds of a step; none if it computes nothing."""
        if not size.tokens:
            return 0.0
        return (
            self.bucket(size).step_s + self.row_pair_s * size.row_pairs + self.chunk_pair_s * size.chunk_pairs
        )

    def forward_s(self, plan: StepPlan) -> float:
        """Seconds of a plan's forward pass."""
        return self.seconds(step_size(plan))

    def is_extrapolated(self, plan: StepPlan) -> bool:
        """Whether the plan's bucket was not measured."""
        return bool(plan.num_tokens) and not self.bucket(step_size(plan)).samples


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTerms:
    """Seconds of sampling by rows (padded): of greedy rows, and of rows that filter."""

    rows: tuple[int, ...]
    greedy_s: tuple[float, ...]
    filtered_s: tuple[float, ...]

    def cost(self, *, greedy: bool) -> Callable[[StepPlan], float]:
        """Seconds of sampling a plan's rows, all of one kind."""
        seconds = self.greedy_s if greedy else self.filtered_s

        def cost(plan: StepPlan) -> float:
            index = int(np.searchsorted(self.rows, plan.num_rows))
            return seconds[min(index, len(seconds) - 1)] if plan.num_rows else 0.0

        return cost


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopTerms:
    """Device and host times in a loop of this depth."""

    depth: int
    steps: StepTable
    host: HostTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Measured sizes and times of one rank of `tp`, or of all of them together.

    `is_shard_shaped`: one device ran the model that one rank of `tp` has, so collectives are not in it, and
    it sampled a shard of the vocabulary. Otherwise `tp` devices ran all of it.
    """

    tp: int
    is_shard_shaped: bool
    loops: tuple[LoopTerms, ...]
    sampling: SamplingTerms

    def at_depth(self, depth: int) -> LoopTerms:
        """The terms of a loop; raises ValueError, with the depths that were measured."""
        for loop in self.loops:
            if loop.depth == depth:
                return loop
        raise ValueError(f"depth {depth} was not measured, only {[loop.depth for loop in self.loops]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A model's steps at several degrees; `device` and `source` say on what and how they were measured."""

    model: str
    dtype: str
    device: str
    source: str
    shards: tuple[Shard, ...]

    def shard(self, tp: int) -> Shard:
        """The measurements for `tp`; raises ValueError, with the degrees there are."""
        for shard in self.shards:
            if shard.tp == tp:
                return shard
        raise ValueError(f"tp {tp} was not measured for {self.model}, only {[s.tp for s in self.shards]}")


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON."""
    path.write_text(json.dumps({"format": FORMAT, **asdict(calibration)}, indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file; raises ValueError if it is none."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is no calibration of format {FORMAT}")
    return dataclass_from_json(Calibration, content)
