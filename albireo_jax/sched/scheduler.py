"""What to compute next: requests in, step plans out, sampled tokens back in.

There is no prefill phase and no decode phase. A sequence has tokens that are *computed* and a *length*;
each step lets it catch up within a budget of tokens, and a row that reaches its length samples one more.
That token counts as part of the length at once, before anyone has seen it (the plan calls it
`TOKEN_ON_DEVICE`), so the next step can be planned while this one runs, at any depth::

    prompt of 5, budget of 3       computed  length   row (start, count)  samples
      plan 1                           0        5         0, 3               no
      plan 2                           3        5         3, 2               yes, position 5
      plan 3   (commit 2 may be late)  5        6         5, 1               yes, position 6

All rows that decode are planned by a few array operations. Because requests start in order of
arrival and a chunk takes all of the budget that is left, at most one running request still has
prompt to compute, and it is the youngest; Python work per request is left to that one, to those that
start, and to those that end.

The last token of a request is known ahead from `max_tokens`: its slot and pages are free for the next
plan as soon as its last step is planned, since the device runs steps in order. An end by a stop
token is seen when its step is committed; what later steps computed for it is dropped, because its id is
gone or its epoch is old.

A row with a constraint waits for its own tokens and delays no other row: see `constraints`.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import NOT_FINITE, TOKEN_ON_DEVICE, Int32s, SampledTokens, SlotParams, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched import policy
from albireo_jax.sched.constraints import ConstrainedAnswer
from albireo_jax.sched.pages import PagePool
from albireo_jax.sched.scoring import give_scores, scored_tokens, take_scores
from albireo_jax.sched.sequence import NOT_ADMITTED, Sequence, SlotTable

_MAX_EPOCH = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Requests and pages now, and what happened since the start.

    `finishing` requests have their last step planned and only wait for its result. `nonfinite` requests
    ended with an error because their logits were not finite.
    """

    waiting: int
    running: int
    finishing: int
    pages_in_use: int
    num_pages: int
    steps: int
    preemptions: int
    nonfinite: int


class _NewPages(NamedTuple):
    """Entries of the page table that a step adds."""

    slots: Int32s
    columns: Int32s
    pages: Int32s


class _Masks(NamedTuple):
    """Rows of a step that may not sample any token: `words` is [len(slots), ceil(vocab / 32)]."""

    slots: Int32s
    words: Int32s


_NO_MASKS = _Masks(np.zeros(0, np.int32), np.zeros((0, 0), np.int32))


class Scheduler:
    """Requests that wait and run, and the pages they hold; it knows no device, clock or text."""

    def __init__(self, config: SchedulerConfig, limits: EngineLimits) -> None:
        self._max_step_tokens = config.max_step_tokens
        self._limits = limits
        self._page_size = limits.page_size
        self._pages = PagePool(limits.num_pages)
        self._table = SlotTable(config.max_rows, max_len=limits.max_sequence_len, page_size=limits.page_size)
        self._free_slots = list(range(config.max_rows - 1, -1, -1))
        self._live: dict[str, Sequence] = {}
        self._may_end = np.zeros(limits.vocab_size + 1, np.bool_)  # ids that stop any request so far
        self._may_end[NOT_FINITE] = True  # the last entry
        self._waiting: deque[Sequence] = deque()
        self._running: Int32s = np.zeros(0, np.int32)  # slots, oldest request first
        self._epoch = NOT_ADMITTED
        self._steps = 0
        self._preemptions = 0
        self._nonfinite = 0
        self._num_constrained = 0  # of the live requests
        self._times_emptied = 0

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    @property
    def times_emptied(self) -> int:
        """How often the last of the requests has ended, so that there was no work for a while."""
        return self._times_emptied

    def stats(self) -> SchedulerStats:
        """Counts of requests, pages and events."""
        return SchedulerStats(
            waiting=len(self._waiting),
            running=len(self._running),
            finishing=len(self._live) - len(self._waiting) - len(self._running),
            pages_in_use=self._pages.num_pages - self._pages.num_free,
            num_pages=self._pages.num_pages,
            steps=self._steps,
            preemptions=self._preemptions,
            nonfinite=self._nonfinite,
        )

    def add(self, request: Request) -> RequestOutput | None:
        """Queue `request` behind all others; ValueError if it could never finish or its id is in use.

        Gives the output of a request that ends at once because its constraint allows nothing or fails.
        """
        self._limits.check(request)
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id!r} is in use")
        sequence = Sequence(request=request, known_ids=np.array(request.prompt_token_ids, np.int32))
        if request.constraint is not None:
            sequence.answer = ConstrainedAnswer(request, request.constraint)
            reason = sequence.answer.look(len(request.prompt_token_ids))
            if reason is not None:
                return RequestOutput(request.request_id, None, reason)
            self._num_constrained += 1
        self._live[request.request_id] = sequence
        self._may_end[list(request.stop_ids)] = True
        self._waiting.append(sequence)
        return None

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, its pages free at once; None if there is none of that id."""
        if request_id not in self._live:
            return None
        sequence = self._forget(request_id)
        if sequence.slot is not None:
            self._release(np.array([sequence.slot], np.int32))
        elif sequence.epoch == NOT_ADMITTED:
            self._waiting.remove(sequence)
        return RequestOutput(request_id, None, FinishReason.ABORT)

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a result is committed."""
        table = self._table
        new_pages = [self._give_decode_pages()]
        rows, first_chunk = self._decoding(), self._num_decoding()
        num_decode = len(rows)
        new_slots, chunks = self._plan_chunks(self._max_step_tokens - num_decode, new_pages)
        num_rows = num_decode + len(chunks)
        if not num_rows:
            return None
        rows = np.concatenate((rows, self._running[first_chunk : first_chunk + len(chunks)]))
        starts = table.computed[rows]
        counts = np.ones(num_rows, np.int32)
        counts[num_decode:] = [len(chunk) for chunk in chunks]
        ends = starts + counts
        samples = ends == table.length[rows]
        updates = _join(new_pages)
        masks = self._masks(rows[samples]) if self._num_constrained else _NO_MASKS
        step_plan = StepPlan(
            step=self._steps,
            request_ids=tuple(table.request_id[rows].tolist()),
            epochs=table.epoch[rows],
            slots=rows,
            starts=starts,
            counts=counts,
            samples=samples,
            token_ids=np.concatenate((np.full(num_decode, TOKEN_ON_DEVICE, np.int32), *chunks)),
            update_slots=updates.slots,
            update_columns=updates.columns,
            update_pages=updates.pages,
            new_slots=tuple(new_slots),
            mask_slots=masks.slots,
            masks=masks.words,
        )
        if table.scored[rows].any():
            step_plan = replace(step_plan, scored=scored_tokens(step_plan, table.scored[rows], self._live))
        self._steps += 1
        table.computed[rows] = ends
        table.length[rows] += samples
        self._retire(rows[table.length[rows] == table.limit[rows]])
        return step_plan

    def commit(self, plan: StepPlan, sampled: SampledTokens) -> list[RequestOutput]:
        """Take in a step's tokens, in the order of the plans; gives one output per request it advanced."""
        table = self._table
        advanced = plan.samples & (table.epoch[plan.slots] == plan.epochs)
        slots, ids = plan.slots[advanced], sampled.ids[advanced]
        table.token_ids[slots, table.committed[slots]] = ids
        table.committed[slots] += 1
        scores = {} if sampled.scores is None else take_scores(plan, sampled.scores, self._live)

        token_ids: list[int | None] = sampled.ids.tolist()
        reasons: list[FinishReason | None] = [None] * plan.num_rows
        to_check = plan.samples & ~advanced  # no longer in the slot: finishing, preempted or gone
        to_check[advanced] = self._may_end[ids]
        if self._num_constrained:
            to_check[advanced] |= table.constrained[slots]
        ended: list[int] = []
        for row in np.flatnonzero(to_check).tolist():
            sequence = self._live.get(plan.request_ids[row])
            if sequence is None or sequence.epoch != plan.epochs[row]:
                continue  # ended or preempted since the step was planned
            advanced[row] = True
            if sampled.ids[row] == NOT_FINITE:
                token_ids[row], reasons[row] = None, FinishReason.ERROR
                self._nonfinite += 1
            else:
                length = int(plan.starts[row] + plan.counts[row]) + 1
                reasons[row] = sequence.take(int(sampled.ids[row]), length=length)
            if reasons[row] is not None:
                self._forget(plan.request_ids[row])
                if sequence.slot is not None:
                    ended.append(sequence.slot)
        if ended:
            self._release(np.array(ended, np.int32))
        rows = zip(plan.request_ids, token_ids, reasons, advanced.tolist(), strict=True)
        outputs = [
            RequestOutput(request_id, token, reason) for request_id, token, reason, kept in rows if kept
        ]
        if scores:
            give_scores(outputs, scores)
        return outputs

    def check_invariants(self) -> None:
        """Raise AssertionError if pages, slots or queues contradict each other; for tests."""
        table, page_size = self._table, self._page_size
        running = self._running
        slots = sorted([*running.tolist(), *self._free_slots])
        assert slots == list(range(len(table.epoch))), f"slots lost or doubled: {slots}"
        held = [table.pages[slot, : table.num_pages[slot]] for slot in running.tolist()]
        used = np.concatenate([np.zeros(0, np.int32), *held])
        pages = np.sort(np.concatenate((used, self._pages.free_pages)))
        assert np.array_equal(pages, np.arange(1, self._pages.num_pages + 1)), (
            f"pages lost or doubled: {pages}"
        )
        owners = np.bincount(used, minlength=self._pages.num_pages + 1)
        assert np.array_equal(owners, self._pages.owners), "reference counts differ from the page tables"
        computed, length = table.computed[running], table.length[running]
        exact = _ceil_div(computed, page_size)
        assert np.array_equal(table.num_pages[running], exact), (
            "pages held are not those of the computed tokens"
        )
        assert (computed < length).all(), "a running request has nothing to compute"
        assert (length < table.limit[running]).all(), "a running request is past its limit"
        assert (computed >= table.known[running])[:-1].all(), (
            "a prompt is computed before that of an older request"
        )
        for slot, request_id in zip(running.tolist(), table.request_id[running].tolist(), strict=True):
            sequence = self._live[request_id]
            assert (sequence.slot, sequence.epoch) == (slot, table.epoch[slot]), f"slot {slot} is another's"
        waiting = [sequence.epoch for sequence in self._waiting]
        assert waiting == [NOT_ADMITTED] * len(waiting), "a waiting request is admitted"

    def _num_decoding(self) -> int:
        """How many running requests have all known tokens computed: all but perhaps the youngest."""
        running, table = self._running, self._table
        if len(running) and table.computed[running[-1]] < table.known[running[-1]]:
            return len(running) - 1
        return len(running)

    def _decoding(self) -> Int32s:
        """Slots that compute one token in the next step: of those that decode, all that are not held."""
        rows, table = self._running[: self._num_decoding()], self._table
        if not self._num_constrained:
            return rows
        return rows[~table.constrained[rows] | (table.committed[rows] == table.length[rows])]

    def _masks(self, sampling: Int32s) -> _Masks:
        """The masks of those of the `sampling` rows that have a constraint."""
        slots = sampling[self._table.constrained[sampling]]
        answers = [self._live[request_id].answer for request_id in self._table.request_id[slots].tolist()]
        words = [answer.mask for answer in answers if answer is not None]
        return _Masks(slots, np.stack(words)) if words else _NO_MASKS

    def _give_decode_pages(self) -> _NewPages:
        """A page for each decoding row whose last one is full; preempts until there are enough."""
        table = self._table
        while True:
            decoding = self._decoding()
            growing = decoding[table.computed[decoding] == table.num_pages[decoding] * self._page_size]
            if len(growing) <= self._pages.num_free:
                return self._give_pages(growing, table.num_pages[growing])
            self._preempt(policy.victim(self._running))

    def _plan_chunks(self, budget: int, new_pages: list[_NewPages]) -> tuple[list[SlotParams], list[Int32s]]:
        """What starts, and the known tokens to compute in the rows behind the decoding ones."""
        new_slots: list[SlotParams] = []
        chunks: list[Int32s] = []
        if self._num_decoding() < len(self._running):
            chunks.append(self._plan_chunk(int(self._running[-1]), budget, new_pages))
            budget -= len(chunks[-1])
        while self._may_start(budget):
            new_slots.append(self._start(self._waiting.popleft()))
            chunks.append(self._plan_chunk(new_slots[-1].slot, budget, new_pages))
            budget -= len(chunks[-1])
        return new_slots, [chunk for chunk in chunks if len(chunk)]

    def _plan_chunk(self, slot: int, budget: int, new_pages: list[_NewPages]) -> Int32s:
        """The next known tokens of the request in `slot`, as many as budget and free pages allow."""
        table = self._table
        start, held = int(table.computed[slot]), int(table.num_pages[slot])
        room = (held + self._pages.num_free) * self._page_size
        end = min(int(table.known[slot]), start + budget, room)
        columns = np.arange(held, _ceil_div(end, self._page_size), dtype=np.int32)
        new_pages.append(self._give_pages(np.full(len(columns), slot, np.int32), columns))
        return table.token_ids[slot, start:end]

    def _give_pages(self, slots: Int32s, columns: Int32s) -> _NewPages:
        """New pages at `columns` of the page tables of `slots`, ascending where a slot repeats."""
        table = self._table
        pages = self._pages.take(len(slots))
        table.pages[slots, columns] = pages
        table.num_pages[slots] = columns + 1
        return _NewPages(slots, columns, pages)

    def _may_start(self, budget: int) -> bool:
        """Whether the head of the queue may start with `budget` tokens left in the step."""
        if budget <= 0 or not self._waiting or not self._free_slots:
            return False
        return policy.may_start(
            num_pages=_ceil_div(len(self._waiting[0].known_ids), self._page_size),
            num_free=self._pages.num_free,
            num_running=len(self._running),
        )

    def _start(self, sequence: Sequence) -> SlotParams:
        """Admit `sequence` as the youngest running request."""
        slot = self._free_slots.pop()
        self._epoch = self._epoch % _MAX_EPOCH + 1
        sequence.epoch, sequence.slot = self._epoch, slot
        self._table.fill(slot, sequence)
        self._running = np.append(self._running, np.int32(slot))
        return sequence.slot_params(slot)

    def _preempt(self, slot: int) -> None:
        """Send the request in `slot` back to the queue; its results in flight are dropped."""
        sequence = self._live[self._table.request_id[slot]]
        sequence.epoch, sequence.slot = NOT_ADMITTED, None
        sequence.known_ids = self._table.token_ids[slot, : self._table.committed[slot]].copy()
        policy.requeue(self._waiting, sequence)
        self._release(np.array([slot], np.int32))
        self._preemptions += 1

    def _forget(self, request_id: str) -> Sequence:
        """Take a request that ended out of the live ones."""
        sequence = self._live.pop(request_id)
        self._num_constrained -= sequence.answer is not None
        self._times_emptied += not self._live
        return sequence

    def _retire(self, slots: Int32s) -> None:
        """Free `slots`, whose requests have their last step planned and only wait for its result."""
        if len(slots):
            for request_id in self._table.request_id[slots].tolist():
                self._live[request_id].slot = None
            self._release(slots)

    def _release(self, slots: Int32s) -> None:
        """Free `slots` and their pages; later steps may reuse both, since the device runs steps in order."""
        self._pages.release(self._table.clear(slots))
        self._free_slots.extend(slots.tolist())
        self._running = self._running[self._table.epoch[self._running] != NOT_ADMITTED]


def _join(parts: list[_NewPages]) -> _NewPages:
    if len(parts) == 1:
        return parts[0]
    return _NewPages(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


_Int = TypeVar("_Int", int, Int32s)


def _ceil_div(count: _Int, size: int) -> _Int:
    return -(-count // size)
