"""Counts tokens that were computed in vain: after a request's end, or a second time.

An end by a stop token or an abort is seen a step late, so that a token behind it is computed and dropped.
A request that was preempted computes again the tokens that it does not find in pages. For each request::

    positions   0 ........ needed - 1 | needed ...          the last token that comes out is never computed
    computed    ------------------------------->            tokens behind `needed` are dropped
    again             ---------->                           below what was computed before: recomputed
"""

from collections.abc import Mapping
from dataclasses import dataclass

from albireo_jax.core.plan import Executor, Int32s, StepHandle, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWork:
    """Tokens that the device computed, padding not counted, and those of them that were of no use.

    computed = recomputed + dropped + each token that was needed and not found in the cache, once.
    """

    computed: int
    recomputed: int
    dropped: int

    @property
    def wasted(self) -> int:
        """All that was of no use."""
        return self.recomputed + self.dropped


class WorkMeter:
    """An executor that remembers the positions of each request that the one behind it was given."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._steps: list[tuple[tuple[str, ...], Int32s, Int32s]] = []  # request ids, starts, counts

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Queue the step behind the meter."""
        self._steps.append((plan.request_ids, plan.starts, plan.steps if len(plan.steps) else plan.counts))
        return self._executor.dispatch(plan)

    def work(self, needed: Mapping[str, int]) -> TokenWork:
        """The work so far; of each request, by its id, the first `needed` positions were of use."""
        reached = dict.fromkeys(needed, 0)
        computed = recomputed = 0
        for request_ids, starts, counts in self._steps:
            ends = (starts + counts).tolist()
            for request_id, start, end in zip(request_ids, starts.tolist(), ends, strict=True):
                known = reached[request_id]
                computed += end - start
                recomputed += max(0, min(known, end) - start)
                reached[request_id] = max(known, end)
        dropped = sum(max(0, end - needed[request_id]) for request_id, end in reached.items())
        return TokenWork(computed=computed, recomputed=recomputed, dropped=dropped)
