"""Dispatched steps: their results, and when they and their copies ended as far as the host can see.

Nothing on the devices tells the time. The host learns whether an array is ready where it polls, at each
dispatch and each wait, and knows a moment exactly only where it waits for it. Otherwise an end lies between
two polls, and exposed time is never understated: a step is taken to end at the first of them, and a copy to
arrive at the second.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from albireo_jax.core.plan import SampledTokens
from albireo_jax.runtime.logprob_calls import PendingLogprobs
from albireo_jax.runtime.sampling_programs import SamplingCost


class PolledArrays:
    """Arrays on their way: `unready_s` is when they were last seen so, `ready_s` when first seen ready."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._arrays = arrays
        self.unready_s = time.perf_counter()
        self.ready_s: float | None = None

    def poll(self) -> bool:
        """Note whether the arrays are ready; True once they are."""
        if self.ready_s is None:
            ready = all(array.is_ready() for array in self._arrays)  # pyright: ignore[reportAttributeAccessIssue]  # on every array
            if ready:
                self._end()
            else:
                self.unready_s = time.perf_counter()
        return self.ready_s is not None

    def wait(self) -> float:
        """Block until the arrays are ready; since when they are, or the last poll before it."""
        if self.poll():
            return self.unready_s
        jax.block_until_ready(self._arrays)
        return self._end()

    def _end(self) -> float:
        self._arrays = ()
        self.ready_s = time.perf_counter()
        return self.ready_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCopies:
    """Copies of one step: `sent` to the devices with it, and `needed`, which were sent before it.

    Copies of both directions take `alone_s` by themselves, as was measured. For `computing_s` of it the
    devices compute nothing else.
    """

    needed: PolledArrays | None = None
    sent: PolledArrays | None = None
    alone_s: float = 0.0
    computing_s: float = 0.0

    def poll(self) -> None:
        """Note which copies have arrived."""
        for watched in (self.needed, self.sent):
            if watched is not None:
                watched.poll()

    def wait_s(self, could_begin_s: float, ended_s: float) -> float:
        """Seconds that a step waited for copies; it could have begun and has ended at these moments."""
        arrived_s = could_begin_s
        if self.needed is not None and self.needed.unready_s >= could_begin_s:
            arrived_s = self.needed.ready_s or ended_s
        waited_s = arrived_s - could_begin_s + self.computing_s
        return min(waited_s, max(ended_s - could_begin_s, 0.0))


class LastStepEnd:
    """The moment at which the last step that was waited for had ended: the next one could begin then."""

    last_s: float = 0.0


class _Run:
    """A step from when it was queued: it has ended once `arrays` are ready."""

    def __init__(self, arrays: Sequence[jax.Array], *, copies: StepCopies, ends: LastStepEnd) -> None:
        self.copies = copies
        self._ends = ends
        self._queued_s = time.perf_counter()
        self._watched = PolledArrays(arrays)

    def poll(self) -> bool:
        """Note whether the step still runs, and which copies have arrived; True once it has ended."""
        ended = self._watched.poll()
        self.copies.poll()
        return ended

    def wait(self) -> "_Span":
        """Block until the step has ended."""
        ended_s = self._watched.wait()
        self.copies.poll()
        could_begin_s = max(self._queued_s, self._ends.last_s)
        self._ends.last_s = ended_s
        return _Span(could_begin_s, ended_s)


class _Span(NamedTuple):
    could_begin_s: float
    ended_s: float


class JaxStepHandle:
    """A step on the device, or several in a loop. Its end is known exactly if the host waited for it.

    `ids` are one per row, or those of each step of a loop, and behind them how many of each row count.
    """

    def __init__(
        self,
        ids: jax.Array,
        num_rows: int,
        *,
        scores: PendingLogprobs,
        sampling: SamplingCost,
        copies: StepCopies,
        ends: LastStepEnd,
    ) -> None:
        self._ids = ids
        self._num_rows = num_rows
        self._scores = scores
        self._sampling = sampling
        self._run = _Run([ids], copies=copies, ends=ends)
        ids.copy_to_host_async()

    def poll(self) -> bool:
        """Note whether the step still runs; True once it has ended."""
        return self._run.poll()

    def wait(self) -> SampledTokens:
        """Block until the ids and scores are on the host."""
        span, copies = self._run.wait(), self._run.copies
        ids = np.asarray(self._ids)[..., : self._num_rows]
        counts = np.zeros(0, np.int32)
        steps = 1
        if ids.ndim == 2:
            ids, counts = ids[:-1], ids[-1]
            steps = int(counts.max())
        return SampledTokens(
            ids=ids,
            counts=counts,
            finished_s=span.ended_s,
            sample_s=self._sampling.seconds * steps,
            copy_s=copies.alone_s,
            copy_wait_s=copies.wait_s(span.could_begin_s, span.ended_s),
            route=self._sampling.route,
            wire_bytes=self._sampling.wire_bytes * steps,
            scores=self._scores.wait(),
        )


class CopyHandle:
    """A step without rows: its copies on their way, for which the devices wait, and no ids."""

    def __init__(self, moving: Sequence[jax.Array], *, copies: StepCopies, ends: LastStepEnd) -> None:
        self._run = _Run(moving, copies=copies, ends=ends)

    def poll(self) -> bool:
        """Note whether the copies still run; True once they have ended."""
        return self._run.poll()

    def wait(self) -> SampledTokens:
        """Block until the copies have ended."""
        span = self._run.wait()
        return SampledTokens(
            ids=np.zeros(0, np.int32),
            finished_s=span.ended_s,
            copy_s=self._run.copies.alone_s,
            copy_wait_s=max(0.0, span.ended_s - span.could_begin_s),
        )
