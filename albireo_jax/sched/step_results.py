"""The results of committed steps: tokens are taken in and become outputs.

Most rows go on with their token, and are handled by array operations. A row is checked by itself if its token
may end its request, if its request has a constraint, or if the request left its slot since the step was
planned.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress, repeat
from typing import Any, NamedTuple, cast

import numpy as np

from albireo_jax.core.plan import NOT_FINITE, Bools, SampledTokens, StepPlan
from albireo_jax.core.types import FinishReason, RequestOutput
from albireo_jax.sched.prefix_cache import PrefixCache
from albireo_jax.sched.sequence import Sequence, SlotTable
from albireo_jax.sched.step_logprobs import give_scores, take_scores
from albireo_jax.sched.step_masks import PendingMasks
from albireo_jax.sched.stop_ids import StopIds

_make = cast("Callable[[tuple[Any, ...]], RequestOutput]", partial(tuple.__new__, RequestOutput))
"""`RequestOutput._make` without its two calls in Python, since a step makes one output for each row."""

_GOES_ON = RequestOutput("", 0, None)[2:]
"""All fields behind the token, of a request that goes on."""


class TakenStep(NamedTuple):
    """The outputs of a step, and the sequences that it ended, which have their slots still."""

    outputs: list[RequestOutput]
    ended: list[Sequence]


class _CheckedRows(NamedTuple):
    """The outputs of some rows of a step, and the sequences that they ended, by row."""

    outputs: dict[int, RequestOutput]
    ended: dict[int, Sequence]


_NONE_CHECKED = _CheckedRows({}, {})


class StepResults:
    """Takes in results for the `live` requests of a scheduler, whose parts it is given.

    `nonfinite` counts requests that ended because their logits were not finite, `dropped` tokens that
    nobody awaited any more.
    """

    def __init__(
        self,
        table: SlotTable,
        cache: PrefixCache,
        pending: PendingMasks,
        *,
        stop_ids: StopIds,
        live: Mapping[str, Sequence],
    ) -> None:
        self.nonfinite = self.dropped = 0
        self._table = table
        self._cache = cache
        self._pending = pending
        self._stop_ids = stop_ids
        self._live = live

    def take(self, plan: StepPlan, sampled: SampledTokens) -> TakenStep:
        """Take in the tokens of a plan of one step."""
        table = self._table
        advanced = plan.samples & (table.epoch[plan.slots] == plan.epochs)
        slots, ids = plan.slots[advanced], sampled.ids[advanced]
        table.token_ids[slots, table.committed[slots]] = ids
        table.committed[slots] += 1
        self._cache.register_running(plan, advanced & (sampled.ids != NOT_FINITE), table, live=self._live)
        scores = {} if sampled.scores is None else take_scores(plan, sampled.scores, self._live)

        to_check = plan.samples & ~advanced  # no longer in the slot: finishing, preempted or gone
        to_check[advanced] = self._stop_ids.may_end(ids)
        if self._pending.num_constrained:
            to_check[advanced] |= table.constrained[slots]
        checked = self._take_checked(plan, sampled, to_check) if to_check.any() else _NONE_CHECKED
        outputs = step_outputs(plan, sampled, kept=advanced, checked=checked.outputs)
        self.dropped += int(plan.samples.sum()) - len(outputs)
        if scores:
            give_scores(outputs, scores)
        self._cache.tell_hits(outputs)
        return TakenStep(outputs, [checked.ended[row] for row in sorted(checked.ended)])

    def _take_checked(self, plan: StepPlan, sampled: SampledTokens, rows: Bools) -> _CheckedRows:
        """Take in the tokens of rows that may end, or whose requests left their slots."""
        outputs: dict[int, RequestOutput] = {}
        ended, bound = dict[int, Sequence](), dict[int, Sequence]()
        ids, epochs = sampled.ids[rows].tolist(), plan.epochs[rows].tolist()
        lengths = (plan.starts[rows] + plan.counts[rows] + 1).tolist()
        for row, token_id, epoch, length in zip(
            np.flatnonzero(rows).tolist(), ids, epochs, lengths, strict=True
        ):
            sequence = self._live.get(plan.request_ids[row])
            if sequence is None or sequence.epoch != epoch:
                continue  # ended or preempted since the step was planned
            reason = FinishReason.ERROR if token_id == NOT_FINITE else sequence.take(token_id, length=length)
            outputs[row] = sequence.output(token_id, reason)
            if sequence.slot is None and token_id != NOT_FINITE:
                self._cache.register_pending(sequence, token_id, ended=reason is not None)
            self.nonfinite += token_id == NOT_FINITE
            if reason is not None:
                ended[row] = sequence
            elif sequence.answer is not None:
                bound[row] = sequence
        for row, reason in self._pending.make(bound).items():
            outputs[row], ended[row] = outputs[row]._replace(finish_reason=reason), bound[row]
        return _CheckedRows(outputs, ended)


def step_outputs(
    plan: StepPlan, sampled: SampledTokens, *, kept: Bools, checked: Mapping[int, RequestOutput]
) -> list[RequestOutput]:
    """The outputs of the rows that are `kept`, which go on, and of those that were `checked`, by row."""
    fields = zip(plan.request_ids, sampled.ids.tolist(), *map(repeat, _GOES_ON), strict=False)
    made = list(map(_make, fields))
    if checked:
        kept = kept.copy()
        kept[list(checked)] = True
        for row, output in checked.items():
            made[row] = output
    return made if kept.all() else list(compress(made, kept.tolist()))
