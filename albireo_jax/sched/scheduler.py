"""The scheduler of steps: requests in, step plans out, sampled tokens back in.

There is no prefill phase and no decode phase. A sequence has tokens that are *computed* and a *length*;
each step lets it catch up within a budget of tokens, and a row that reaches its length samples one more.
That token counts as part of the length at once, before anyone has seen it (the plan calls it
`TOKEN_ON_DEVICE`), so the next step can be planned while this one runs, at any depth::

    prompt of 5, budget of 3       computed  length   row (start, count)  samples
      plan 1                           0        5         0, 3               no
      plan 2                           3        5         3, 2               yes, position 5
      plan 3   (commit 2 may be late)  5        6         5, 1               yes, position 6

All rows that decode are planned by a few array operations. Because a chunk takes all of the budget that is
left, at most one running request still has prompt to compute, and it is the one that started last. Python
work per request is left to that one, to those that start, and to those that end.

The last token of a request is known ahead from `max_tokens`: its slot and pages are free for the next
plan as soon as its last step is planned, since the device runs steps in order. An end by a stop
token is seen when its step is committed; what later steps computed for it is dropped, because its id is
gone or its epoch is old.

A row with a constraint waits for its own tokens and masks, and delays no other row: see `constraints`. A
`Policy` says which request starts first and which is preempted: see `policy`.
"""

from dataclasses import replace

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import (
    TOKEN_ON_DEVICE,
    CopyCosts,
    Int32s,
    SampledTokens,
    SlotParams,
    StepPlan,
    TokenConstraint,
)
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.constraints import NO_MASKS, ConstrainedAnswer, InlineMaskMaker, MaskMaker
from albireo_jax.sched.kv_pages import KvPages
from albireo_jax.sched.multi_step import check_ends, single_steps, steps_of
from albireo_jax.sched.policy import POLICIES, Policy, has_room, most_copied
from albireo_jax.sched.prefix_cache import PrefixCache
from albireo_jax.sched.prefix_tree import Node
from albireo_jax.sched.running_requests import RunningRequests
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sched.sequence import NOT_ADMITTED, NewPages, Sequence, SlotTable, join_pages
from albireo_jax.sched.step_logprobs import scored_tokens
from albireo_jax.sched.step_masks import PendingMasks, masks_of
from albireo_jax.sched.step_results import StepResults
from albireo_jax.sched.stop_ids import StopIds
from albireo_jax.sched.waiting_queue import WaitingQueue


class Scheduler:
    """Requests that wait and run, and the pages they hold; it knows no device, clock or text.

    `policy` is the one that `config` names if it is None.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        limits: EngineLimits,
        *,
        shares_prefixes: bool = True,
        copy_costs: CopyCosts | None = None,
        mask_maker: MaskMaker | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._policy = policy or POLICIES[config.scheduling_policy]
        self._max_step_tokens = config.max_step_tokens
        self._decode_steps = config.decode_steps
        self._limits = limits
        self._page_size = limits.page_size
        self._tiers = KvPages(limits.num_pages, num_host_pages=limits.num_host_pages)
        self._cache = PrefixCache(
            self._tiers, page_size=limits.page_size, shares=shares_prefixes, costs=copy_costs
        )
        self._table = SlotTable(config.max_rows, max_len=limits.max_sequence_len, page_size=limits.page_size)
        self._pending = PendingMasks(mask_maker or InlineMaskMaker(), self._table)
        self._live: dict[str, Sequence] = {}
        self._stop_ids = StopIds(limits.vocab_size)
        self._waiting = WaitingQueue(
            self._tiers,
            self._cache,
            self._table,
            max_copied=most_copied(config.max_copied_pages, costs=copy_costs),
            max_step_tokens=config.max_step_tokens,
        )
        self._results = StepResults(
            self._table, self._cache, self._pending, stop_ids=self._stop_ids, live=self._live
        )
        self._running = RunningRequests(self._table, self._tiers, max_rows=config.max_rows)
        self._arrivals = self._steps = 0
        self._committed_step = -1
        self._preemptions = self._times_emptied = 0

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    @property
    def times_emptied(self) -> int:
        """The number of times that the last request ended and left no work."""
        return self._times_emptied

    def stats(self) -> SchedulerStats:
        """Counts of requests, pages and events."""
        return SchedulerStats(
            tiers=self._tiers.stats(),
            cache=self._cache.stats(),
            waiting=len(self._waiting),
            running=len(self._running),
            finishing=len(self._live) - len(self._waiting) - len(self._running),
            steps=self._steps,
            preemptions=self._preemptions,
            nonfinite=self._results.nonfinite,
            dropped=self._results.dropped,
        )

    def add(self, request: Request, constraint: TokenConstraint | None = None) -> RequestOutput | None:
        """Queue `request` at its place; ValueError if it could never finish or its id is in use.

        Gives the output of a request that ends at once because its own `constraint` allows nothing or fails.
        """
        self._limits.check(request)
        if request.request_id in self._live:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._arrivals += 1
        place = (*self._policy.order(request), self._arrivals)
        sequence = Sequence(request, request.prompt_token_ids, place, root=self._cache.root(request))
        if constraint is not None:
            sequence.answer = ConstrainedAnswer(request, constraint)
            if (reason := sequence.answer.update_mask(len(request.prompt_token_ids))) is not None:
                return RequestOutput(request.request_id, None, reason)
            self._pending.num_constrained += 1
        self._live[request.request_id] = sequence
        self._stop_ids.add(request.stop_ids)
        self._waiting.push(sequence)
        return None

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, its pages free at once; None if there is none of that id."""
        if (sequence := self._live.get(request_id)) is None:
            return None
        self._cache.drop(request_id)
        if sequence.slot is not None:
            self._release_unfinished(sequence)
        self._end([sequence])
        return RequestOutput(request_id, None, FinishReason.ABORT)

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a result is committed."""
        table = self._table
        new_pages = [self._give_decode_pages()]
        rows, first_chunk = self._decoding(), self._running.num_decoding
        num_decode = len(rows)
        steps = self._plan_steps(rows, new_pages)
        new_slots, chunks = self._plan_chunks(self._max_step_tokens - num_decode, new_pages)
        num_rows = num_decode + len(chunks)
        if self._running.has_free_slot:
            self._waiting.restore(self._running.slots, step=self._steps)
        copies = self._tiers.copies()
        if not (num_rows or copies.to_device or copies.to_host):
            return None
        rows = np.concatenate((rows, self._running.slots[first_chunk : first_chunk + len(chunks)]))
        starts = table.computed[rows]
        counts = np.ones(num_rows, np.int32)
        counts[num_decode:] = [len(chunk) for chunk in chunks]
        ends = starts + counts
        samples = ends == table.length[rows]
        updates = join_pages(new_pages)
        masks = masks_of(rows[samples], table, self._live) if self._pending.num_constrained else NO_MASKS
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
            copies=copies,
            steps=steps,
        )
        if table.scored[rows].any():
            step_plan = replace(step_plan, scored=scored_tokens(step_plan, table.scored[rows], self._live))
        self._steps += 1
        table.computed[rows] = starts + steps if len(steps) else ends
        table.length[rows] += steps if len(steps) else samples
        self._retire(rows[table.length[rows] == table.limit[rows]])
        return step_plan

    def commit(self, plan: StepPlan, sampled: SampledTokens) -> list[RequestOutput]:
        """Take in a plan's tokens, in the order of the plans; gives an output per token of a live request."""
        self._committed_step = plan.step
        for suspect in self._cache.register_chunks(plan, sampled.ids):
            self._waiting.drop(suspect, self._running.slots)
        outputs: list[RequestOutput] = []
        for step in single_steps(plan, sampled):
            taken = self._results.take(*step)
            self._end(taken.ended)
            outputs += taken.outputs
        check_ends(plan, sampled, self._live)
        return outputs

    def take_masks(self, timeout_s: float = 0.0) -> list[RequestOutput]:
        """Let rows go on whose masks were made late, after a wait if there is none; the outputs of ends.

        Nothing is waited for if no mask is pending.
        """
        late = self._pending.take(timeout_s)
        self._end([sequence for sequence, _ in late])
        return [RequestOutput(sequence.request.request_id, None, reason) for sequence, reason in late]

    def forget_prefixes(self) -> None:
        """Let requests that are added from now on find no page of earlier ones."""
        self._cache.forget()

    def check_idle(self) -> None:
        """Raise AssertionError if a page is owned or lost though no request is left; only counts."""
        assert not self._live, f"{len(self._live)} requests are left"
        self._tiers.check_unowned()

    def check_invariants(self) -> None:
        """Raise AssertionError if pages, slots or queues contradict each other; for tests."""
        table, running = self._table, self._running.slots
        self._running.check_invariants(self._live)
        held = [table.pages[slot, : table.num_pages[slot]] for slot in running.tolist()]
        self._tiers.check_invariants(np.concatenate([self._waiting.held_pages(), *held]))
        self._waiting.check_invariants()
        self._stop_ids.check_invariants(sequence.request.stop_ids for sequence in self._live.values())

    def _decoding(self) -> Int32s:
        """Slots that compute one token in the next step: of those that decode, all that are not held."""
        rows = self._running.slots[: self._running.num_decoding]
        return rows[~self._table.are_held(rows)] if self._pending.num_constrained else rows

    def _give_decode_pages(self) -> NewPages:
        """A page for each decoding row whose last one is full; preempts until there are enough."""
        table = self._table
        while True:
            decoding = self._decoding()
            growing = decoding[table.computed[decoding] == table.num_pages[decoding] * self._page_size]
            if len(growing) <= self._tiers.num_available:
                return self._give_pages(growing, table.num_pages[growing])
            if not self._waiting.release_last():
                self._preempt(self._policy.victim(self._running.in_order))

    def _plan_steps(self, rows: Int32s, new_pages: list[NewPages]) -> Int32s:
        """Steps that each of the decoding `rows` takes, if they take several and nothing else happens."""
        if self._decode_steps == 1 or len(self._waiting) or len(rows) < len(self._running):
            return np.zeros(0, np.int32)
        steps, places = steps_of(
            rows, self._table, most=self._decode_steps, num_available=self._tiers.num_available
        )
        if len(steps):
            new_pages.append(self._give_pages(*places))
        return steps

    def _plan_chunks(self, budget: int, new_pages: list[NewPages]) -> tuple[list[SlotParams], list[Int32s]]:
        """The requests that start, and the known tokens to compute in the rows behind the decoding ones."""
        new_slots: list[SlotParams] = []
        chunks: list[Int32s] = []
        if (num_decoding := self._running.num_decoding) < len(self._running):
            chunks.append(self._plan_chunk(int(self._running.slots[-1]), budget, new_pages))
            budget -= len(chunks[-1])
        while budget > 0 and self._running.has_free_slot and has_room(len(chunks), num_decoding=num_decoding):
            startable = self._waiting.pop(self._running.slots, committed_step=self._committed_step)
            if startable is None:
                break
            self._cache.count_start(startable.sequence, num_pages=len(startable.chain))
            new_slots.append(self._running.start(*startable))
            chunks.append(self._plan_chunk(new_slots[-1].slot, budget, new_pages))
            budget -= len(chunks[-1])
        return new_slots, [chunk for chunk in chunks if len(chunk)]

    def _plan_chunk(self, slot: int, budget: int, new_pages: list[NewPages]) -> Int32s:
        """The next known tokens of the request in `slot`, as many as budget and free pages allow."""
        table = self._table
        start, held = int(table.computed[slot]), int(table.num_pages[slot])
        room = (held + self._tiers.num_available) * self._page_size
        end = min(int(table.known[slot]), start + budget, room)
        columns = np.arange(held, -(-end // self._page_size), dtype=np.int32)
        new_pages.append(self._give_pages(np.full(len(columns), slot, np.int32), columns))
        if start < end:
            self._cache.expect_chunk(self._live[table.request_id[slot]], end, step=self._steps, table=table)
        return table.token_ids[slot, start:end]

    def _give_pages(self, slots: Int32s, columns: Int32s) -> NewPages:
        """New pages at `columns` of the page tables of `slots`, ascending where a slot repeats."""
        return self._table.give(slots, columns, self._tiers.take(len(slots)))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running request back to its place in the queue; its results in flight are dropped."""
        sequence.known_ids = self._table.token_ids[
            sequence.slot, : self._table.committed[sequence.slot]
        ].copy()
        self._release_unfinished(sequence)
        sequence.epoch = NOT_ADMITTED
        self._waiting.push(sequence)
        self._preemptions += 1

    def _end(self, sequences: list[Sequence]) -> None:
        """Forget requests that ended; frees their slots if they have any, or takes them out of the queue."""
        for sequence in sequences:
            del self._live[sequence.request.request_id]
            self._stop_ids.remove(sequence.request.stop_ids)
            self._pending.drop(sequence)
            self._times_emptied += not self._live
            if sequence.epoch == NOT_ADMITTED:
                self._waiting.remove(sequence)
        self._running.release([sequence for sequence in sequences if sequence.slot is not None])

    def _retire(self, slots: Int32s) -> None:
        """Free `slots`, whose requests have their last step planned and only wait for its result."""
        if not len(slots):
            return
        pending: list[Node] = []
        sequences = [self._live[request_id] for request_id in self._table.request_id[slots].tolist()]
        for slot, sequence in zip(slots.tolist(), sequences, strict=True):
            pending += self._cache.expect_last(sequence, slot, self._table)
        self._running.release(sequences, pending=pending)

    def _release_unfinished(self, sequence: Sequence) -> None:
        """Free the slot of a request that has more to compute; pages that are being filled are pending."""
        pending, sequence.pending = list(sequence.pending.values()), {}
        self._running.release([sequence], pending=pending)
