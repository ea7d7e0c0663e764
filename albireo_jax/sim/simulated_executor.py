"""The executor's protocol on a clock instead of a GPU, with a device state that is really kept.

The simulated model is a transformer in miniature: two layers of keys and values in paged cells, read
through the page table of the row's slot. The first layer's value of a token mixes its id and position; the
second layer's mixes in the sum of the first layer's values up to it, as they are read when it is written;
and the next token is a hash of the sum of the second layer's, of the position and, unless the
temperature is 0, of the seed; where a mask allows n tokens, the hash modulo n picks one of them. A page
that is lost, shared or filled by another request, a slot or a position that is wrong, or an order that is
not kept, changes the tokens that follow. Pages move to and from host cells as `PageCopies` says: what is
copied in is not there before the next step. The scores of a token are hashes of it and of the same sums, so
that they depend on everything before it. A plan of several steps takes as long as if no row ended before its
last one.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.config import MAX_LOGPROBS
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import (
    NULL_PAGE,
    TOKEN_ON_DEVICE,
    Floats,
    Int32s,
    LogprobArrays,
    PageCopies,
    SampledTokens,
    SlotParams,
    StepPlan,
)
from albireo_jax.sim.lanes import Clock, CopyTimes, Cost, Lanes, QueuedStep, cost_of_steps

_UInt64s = NDArray[np.uint64]


class SimExecutor:
    """Runs plans in order on simulated device state, each `cost(plan)` seconds after the one before.

    Copies between the tiers take `page_copy_s` a page, on a lane for each direction beside the device. A step
    waits for the copies to the device that the step before it started.

    A step reads its plan only when its result, or a later one, is waited for: a plan that changed after
    its dispatch is found out.
    """

    def __init__(
        self, limits: EngineLimits, *, max_rows: int, cost: Cost, clock: Clock, page_copy_s: float = 0.0
    ) -> None:
        self._device = _Device(limits, max_rows)
        self._cost = cost
        self._clock = clock
        self._lanes = Lanes(clock, page_copy_s=page_copy_s)
        self._queued: deque[_SimHandle] = deque()

    @property
    def copy_times(self) -> CopyTimes:
        """Times of all copies so far."""
        return self._lanes.copy_times

    def dispatch(self, plan: StepPlan) -> "_SimHandle":
        """Queue a step; it starts now, or when the step before it and the copies that it needs end."""
        handle = _SimHandle(self, plan, self._lanes.queue(plan, cost_s=cost_of_steps(plan, self._cost)))
        self._queued.append(handle)
        return handle

    def finish(self, handle: "_SimHandle") -> SampledTokens:
        """Run what is queued up to and with `handle`, and let its time pass."""
        while handle.sampled is None:
            queued = self._queued.popleft()
            queued.sampled = self._device.run(queued.plan)
        step = handle.step
        self._clock.advance_to(step.finished_s)
        return SampledTokens(
            ids=handle.sampled.ids,
            counts=handle.sampled.counts,
            finished_s=step.finished_s,
            copy_s=step.copies.copied_s,
            copy_wait_s=step.copies.exposed_s,
            scores=handle.sampled.scores,
        )


class _SimHandle:
    def __init__(self, executor: SimExecutor, plan: StepPlan, step: QueuedStep) -> None:
        self._executor = executor
        self.plan = plan
        self.step = step
        self.sampled: _Sampled | None = None

    def wait(self) -> SampledTokens:
        return self._executor.finish(self)


class _Sampled(NamedTuple):
    """A plan's samples, as in `SampledTokens`."""

    ids: Int32s
    counts: Int32s
    scores: LogprobArrays | None


class _Device:
    """Page tables, cells, last tokens and sampling parameters, changed by one step after the other."""

    def __init__(self, limits: EngineLimits, max_rows: int) -> None:
        self._page_size = limits.page_size
        self._vocab_size = limits.vocab_size
        columns = -(-limits.max_sequence_len // limits.page_size)
        self._page_table = np.full((max_rows, columns), NULL_PAGE, np.int32)
        self._cells = np.zeros((2, limits.num_pages + 1, limits.page_size), np.uint64)
        self._first, self._second = self._cells
        self._host_cells = np.zeros((2, limits.num_host_pages + 1, limits.page_size), np.uint64)
        self._arriving: list[tuple[int, _UInt64s]] = []
        self._last_token = np.zeros(max_rows, np.int64)
        self._params: list[SlotParams | None] = [None] * max_rows

    def run(self, plan: StepPlan) -> _Sampled:
        """One step, or several; ids are 0 for rows that do not sample."""
        self._copy_pages(plan.copies)
        for params in plan.new_slots:
            self._params[params.slot] = params
            self._page_table[params.slot, : len(params.pages)] = params.pages
        self._page_table[plan.update_slots, plan.update_columns] = plan.update_pages
        if len(plan.steps):
            return self._run_steps(plan)
        ids = self._run_rows(plan)
        return _Sampled(ids, plan.steps, self._scores(plan, ids) if plan.scored.count else None)

    def _run_steps(self, plan: StepPlan) -> _Sampled:
        """Steps of the rows that go on, those of rows that have ended left out."""
        ids = np.zeros((plan.num_steps, plan.num_rows), np.int32)
        counts = np.where(self._has_ended(plan.slots), 0, plan.steps).astype(np.int32)
        for step in range(plan.num_steps):
            rows = np.flatnonzero(counts > step).astype(np.int32)
            ids[step, rows] = self._run_rows(plan.nth_step(step, rows))
            counts[rows[self._has_ended(plan.slots[rows])]] = step + 1
        return _Sampled(ids, counts, None)

    def _has_ended(self, slots: Int32s) -> NDArray[np.bool_]:
        """Whether the last token of each slot was one that ends its request."""
        params = [self._params[slot] for slot in slots.tolist()]
        lasts = zip(self._last_token[slots].tolist(), params, strict=True)
        return np.array([own is not None and last in own.stop_ids for last, own in lasts], np.bool_)

    def _run_rows(self, plan: StepPlan) -> Int32s:
        """The rows of one step, whatever it writes before them being there."""
        masks = dict(zip(plan.mask_slots.tolist(), plan.masks, strict=True))
        ids = np.zeros(plan.num_rows, np.int32)
        ends = np.cumsum(plan.counts)
        rows = zip(
            plan.slots.tolist(), plan.starts.tolist(), ends.tolist(), plan.counts.tolist(), strict=True
        )
        for row, (slot, start, end, count) in enumerate(rows):
            tokens = plan.token_ids[end - count : end].astype(np.int64)
            tokens[tokens == TOKEN_ON_DEVICE] = self._last_token[slot]
            context = self._forward(slot, start, tokens)
            if plan.samples[row]:
                ids[row] = self._last_token[slot] = self._sample(
                    slot, position=start + count, context=context, mask=masks.get(slot)
                )
        return ids

    def _scores(self, plan: StepPlan, ids: Int32s) -> LogprobArrays:
        """Scores of the ids in their contexts, as the step's keys and values have them."""
        scored = plan.scored
        lasts = (np.cumsum(plan.counts) - 1)[scored.rows]
        tokens = np.concatenate((lasts, scored.tokens))
        position = plan.starts.repeat(plan.counts) + np.concatenate([np.arange(n) for n in plan.counts])
        slot = plan.slots.repeat(plan.counts)[tokens]
        page = self._page_table[slot, position[tokens] // self._page_size]
        context = self._second[page, position[tokens] % self._page_size]
        next_ids = np.concatenate((ids[scored.rows], scored.next_ids))
        key = _mix(context ^ _mix(next_ids.astype(np.uint64)))
        order = np.arange(MAX_LOGPROBS, dtype=np.uint64)[None, :]
        return LogprobArrays(
            logprobs=-_fraction(key),
            ranks=(key % np.uint64(self._vocab_size)).astype(np.int32) + 1,
            top_ids=((key[:, None] + order) % np.uint64(self._vocab_size)).astype(np.int32),
            top_logprobs=-_fraction(key)[:, None] * (1 + order.astype(np.float32)),
        )

    def _copy_pages(self, copies: PageCopies) -> None:
        """Write the pages that the step before sent for, read those that go out, and send for others."""
        for page, cells in self._arriving:
            self._cells[:, page] = cells
        for page, host in copies.to_host:
            self._host_cells[:, host] = self._cells[:, page]
        self._arriving = [(page, self._host_cells[:, host].copy()) for host, page in copies.to_device]

    def _forward(self, slot: int, start: int, tokens: NDArray[np.int64]) -> np.uint64:
        """Write the cells of `tokens` from position `start` on; sum the second layer of the context."""
        end = start + len(tokens)
        position = np.arange(end)
        page, offset = self._page_table[slot, position // self._page_size], position % self._page_size
        new = slice(start, end)
        written = page[new], offset[new]
        self._first[written] = _mix(tokens.astype(np.uint64) + _mix(position[new].astype(np.uint64)))
        context = np.cumsum(self._first[page, offset], dtype=np.uint64)
        self._second[written] = _mix(self._first[written] ^ context[new])
        return self._second[page, offset].sum(dtype=np.uint64)

    def _sample(self, slot: int, *, position: int, context: np.uint64, mask: Int32s | None) -> int:
        """The token at `position`, of those in `mask`; below `banned_until` the next that does not stop."""
        params = self._params[slot]
        assert params is not None, f"slot {slot} has no sampling parameters"
        noise = 0
        if not params.sampling.is_greedy:
            *others, seed = params.sampling.by_name().values()
            noise = hash((seed, *others))
        keys = np.array((position, noise & _MASK), np.uint64)
        chosen = int(_mix(context ^ _mix(keys).sum(dtype=np.uint64, keepdims=True))[0])
        allowed = range(self._vocab_size) if mask is None else _token_ids(mask)
        banned = params.stop_ids if position < params.banned_until else ()
        candidates = (allowed[(chosen + step) % len(allowed)] for step in range(len(allowed)))
        return next(candidate for candidate in candidates if candidate not in banned)


_MASK = 2**64 - 1


def _fraction(keys: _UInt64s) -> Floats:
    """Keys as numbers from 0 to 1."""
    return (keys >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def _token_ids(mask: Int32s) -> list[int]:
    """The tokens that a mask allows, in order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def _mix(values: _UInt64s) -> _UInt64s:
    """Spread every bit of 64 over all (the finalizer of splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def same_token(plan: StepPlan, token_id: int, *, finished_s: float) -> SampledTokens:
    """The result of a plan all rows of which sample one and the same token, which ends none of them."""
    shape = (plan.num_steps, plan.num_rows) if len(plan.steps) else (plan.num_rows,)
    return SampledTokens(ids=np.full(shape, token_id, np.int32), counts=plan.steps, finished_s=finished_s)


class NullExecutor:
    """Computes nothing and returns `token_id` for every row: what remains is the work of the host."""

    def __init__(self, *, token_id: int, clock: Callable[[], float]) -> None:
        self._token_id = token_id
        self._clock = clock

    def dispatch(self, plan: StepPlan) -> "_NullHandle":
        """Nothing to queue."""
        return _NullHandle(same_token(plan, self._token_id, finished_s=self._clock()))


class _NullHandle:
    def __init__(self, sampled: SampledTokens) -> None:
        self._sampled = sampled

    def wait(self) -> SampledTokens:
        return self._sampled
