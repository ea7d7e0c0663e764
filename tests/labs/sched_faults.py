"""Faults that the laws must catch: each changes what passes between scheduler, loop and device."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from albireo_jax.core.plan import NOT_FINITE, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.scheduler import Scheduler
from tests.labs.sched_lab import MAX_LEN, VOCAB_SIZE, Case, House, Journal, Rule, run

SMALL = House(depth=2, page_size=4, num_pages=MAX_LEN // 4, max_rows=4, max_step_tokens=12, num_host_pages=6)
ROOMY = replace(SMALL, num_pages=200)
FINE = replace(SMALL, page_size=2, num_pages=MAX_LEN // 2, max_rows=3, num_host_pages=20)


class Faulty:
    """A scheduler of which some calls are replaced by functions of it."""

    def __init__(
        self,
        real: Scheduler,
        *,
        add=Scheduler.add,
        abort=Scheduler.abort,
        plan=Scheduler.plan,
        commit=Scheduler.commit,
        take_masks=Scheduler.take_masks,
    ) -> None:
        self.real = real
        self.add = partial(add, real)
        self.abort = partial(abort, real)
        self.plan = partial(plan, real)
        self.commit = partial(commit, real)
        self.take_masks = partial(take_masks, real)

    @property
    def has_work(self) -> bool:
        return self.real.has_work

    @property
    def times_emptied(self) -> int:
        return self.real.times_emptied


def with_calls(**functions):
    """Run with some of the scheduler's calls replaced."""
    return partial(run, break_scheduler=partial(Faulty, **functions))


def with_plans(change, *, every=3):
    """Run with every third plan changed."""

    def plan(real: Scheduler) -> StepPlan | None:
        made = real.plan()
        return change(made) if made is not None and made.step % every == every - 1 else made

    return with_calls(plan=plan)


def with_late_masks(run_with_fault):
    """Run in a house whose masks are late."""
    return lambda case, house: run_with_fault(case, replace(house, late_masks=7))


# The faults: each runs a case with the fault in it.


def page_update_lost(plan: StepPlan) -> StepPlan:
    return replace(
        plan,
        update_slots=plan.update_slots[:-1],
        update_columns=plan.update_columns[:-1],
        update_pages=plan.update_pages[:-1],
    )


def page_given_early(plan: StepPlan) -> StepPlan:
    column, page = MAX_LEN // SMALL.page_size - 1, SMALL.num_pages
    return replace(
        plan,
        update_slots=np.append(plan.update_slots, plan.slots[:1]),
        update_columns=np.append(plan.update_columns, np.int32(column)),
        update_pages=np.append(plan.update_pages, np.int32(page)),
    )


def page_in_use_given(plan: StepPlan) -> StepPlan:
    return replace(plan, update_pages=np.ones_like(plan.update_pages))


def slots_exchanged(plan: StepPlan) -> StepPlan:
    return replace(plan, slots=plan.slots[::-1])


def position_too_low(plan: StepPlan) -> StepPlan:
    return replace(plan, starts=np.maximum(plan.starts - 1, 0))


def seeds_of_others(plan: StepPlan) -> StepPlan:
    return replace(
        plan,
        new_slots=tuple(
            replace(params, sampling=params.sampling.with_seed((params.sampling.seed or 0) + 1))
            for params in plan.new_slots
        ),
    )


def ban_forgotten(plan: StepPlan) -> StepPlan:
    return replace(plan, new_slots=tuple(replace(params, banned_until=0) for params in plan.new_slots))


def newest_first(case: Case, house: House) -> Journal:
    held: list[tuple[Request, Rule | None]] = []

    def add(real: Scheduler, *request: Any) -> None:
        held.append(request)
        if len(held) == 2:
            real.add(*held.pop())
            real.add(*held.pop())

    return with_calls(add=add)(case, house)


def plan_arrays_reused(case: Case, house: House) -> Journal:
    def broken(executor):
        plans: list[StepPlan] = []

        def dispatch(plan: StepPlan):
            for earlier in plans[-1:]:
                earlier.starts[:] = plan.starts[0]
            plans.append(plan)
            return executor.dispatch(plan)

        return SimpleNamespace(dispatch=dispatch)

    return run(case, house, break_executor=broken)


def budget_exceeded(case: Case, house: House) -> Journal:
    larger = replace(house, max_step_tokens=house.max_step_tokens + 1)
    return run(case, house, break_scheduler=lambda _: Scheduler(larger.config, larger.limits))


def epochs_ignored(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    current = [real._live[r].epoch if r in real._live else -1 for r in plan.request_ids]
    return real.commit(replace(plan, epochs=np.array(current, np.int32)), sampled)


def results_of_neighbours(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, replace(sampled, ids=np.roll(sampled.ids, 1)))


def result_lost(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return [] if plan.step % 5 == 4 else real.commit(plan, sampled)


def result_taken_twice(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, sampled) + (real.commit(plan, sampled) if plan.step == 4 else [])


def abort_not_passed_on(_: Scheduler, request_id: str) -> RequestOutput:
    return RequestOutput(request_id, None, FinishReason.ABORT)


def abort_of_another(real: Scheduler, _: str) -> RequestOutput | None:
    return real.abort("r2")


def stop_ids_forgotten(real: Scheduler, request: Request, rule: Rule | None) -> None:
    real.add(replace(request, stop_ids=()), rule)


def stop_ids_of_all_forgotten(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    """A request that ends takes the stop ids of the others with it."""
    outputs = real.commit(plan, sampled)
    if any(output.finish_reason is not None for output in outputs):
        real._stop_ids._may_end[:-1] = False
    return outputs


def one_token_more(real: Scheduler, request: Request, rule: Rule | None) -> None:
    real.add(replace(request, max_tokens=request.max_tokens + 1), rule)


def row_left_out(real: Scheduler) -> StepPlan | None:
    """The oldest row is forgotten in some steps."""
    if real._steps % 5 != 4 or len(real._running) < 2:
        return real.plan()
    running = real._running
    oldest, running.slots = running.slots[:1], running.slots[1:]
    plan = real.plan()
    running.slots = np.concatenate((oldest, running.slots))
    return plan


def constraint_dropped(real: Scheduler, request: Request, _: Rule | None) -> RequestOutput | None:
    return real.add(request)


def rule_changed(real: Scheduler, request: Request, rule: Rule | None) -> RequestOutput | None:
    if rule is None:
        return real.add(request)
    return real.add(request, Rule(replace(rule.bond, modulus=rule.bond.modulus + 1)))


def failure_passed_over(real: Scheduler, request: Request, rule: Rule | None) -> RequestOutput | None:
    return real.add(request, None if rule is None else Rule(replace(rule.bond, fails_after=None)))


def end_passed_over(real: Scheduler, request: Request, rule: Rule | None) -> RequestOutput | None:
    return real.add(request, None if rule is None else Rule(replace(rule.bond, max_length=None)))


def masks_of_rows_that_have_none(plan: StepPlan) -> StepPlan:
    free = np.setdiff1d(plan.slots, plan.mask_slots)
    masks = np.full((len(free), 1), 2**VOCAB_SIZE - 1, np.int32)
    return replace(
        plan,
        mask_slots=np.concatenate((plan.mask_slots, free)),
        masks=np.concatenate((plan.masks.reshape(-1, 1), masks)),
    )


def scores_of_neighbours(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    if sampled.scores is not None:
        sampled = replace(
            sampled, scores=replace(sampled.scores, logprobs=np.roll(sampled.scores.logprobs, 1))
        )
    return real.commit(plan, sampled)


def prompt_scored_again(real: Scheduler) -> StepPlan | None:
    """By a request that comes back."""
    for sequence in real._waiting._queue:
        sequence.num_scored = 0
    return real.plan()


def copy_in_lost(plan: StepPlan) -> StepPlan:
    return replace(plan, copies=replace(plan.copies, to_device=plan.copies.to_device[:-1]))


def copies_out_exchanged(plan: StepPlan) -> StepPlan:
    pages = [page for page, _ in plan.copies.to_host][::-1]
    hosts = [host for _, host in plan.copies.to_host]
    return replace(plan, copies=replace(plan.copies, to_host=tuple(zip(pages, hosts, strict=True))))


def host_page_twice(plan: StepPlan) -> StepPlan:
    hosts = [1 for _ in plan.copies.to_host]
    pages = [page for page, _ in plan.copies.to_host]
    return replace(plan, copies=replace(plan.copies, to_host=tuple(zip(pages, hosts, strict=True))))


def prefixes_of_all_salts(real: Scheduler, request: Request, rule: Rule | None) -> RequestOutput | None:
    return real.add(replace(request, cache_salt=""), rule)


def prefixes_found_too_early(real: Scheduler) -> StepPlan | None:
    """The pages of prompts can be found as soon as their last token is planned."""
    plan = real.plan()
    if plan is not None and not len(plan.steps):
        real._cache.register_chunks(plan, np.zeros(plan.num_rows, np.int32))
    return plan


def prefixes_found_late(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    """The pages of a prompt cannot be found before its last chunk is committed."""
    if plan.num_rows and not plan.samples[-1]:
        real._cache._chunks.pop(plan.step, None)
    return real.commit(plan, sampled)


def prefix_kept_that_is_not_finite(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    real._waiting.drop = lambda *_, **__: None
    return real.commit(plan, sampled)


def prefix_taken_for_finite(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    """Nobody looks at the logits behind a prompt before its pages can be found."""
    real._cache.register_chunks(plan, np.zeros(plan.num_rows, np.int32))
    return real.commit(plan, sampled)


def nobody_waits_for_pages(real: Scheduler) -> StepPlan | None:
    real._cache.is_awaited = lambda *_: False
    return real.plan()


def waits_for_ever(real: Scheduler) -> StepPlan | None:
    """A request waits for pages that nobody computes."""
    real._cache.is_awaited = lambda sequence, _: sequence.request.request_id == "r3"
    return real.plan()


def waits_for_others(real: Scheduler) -> StepPlan | None:
    """A request waits while any page is on its way."""
    real._cache.is_awaited = lambda *_: bool(real._cache._coming)
    return real.plan()


def looked_up_once(real: Scheduler) -> StepPlan | None:
    """A request that has found a page looks for no more while it waits."""
    find = type(real._cache).find
    real._cache.find = lambda sequence: list(sequence.chain) or find(real._cache, sequence)
    return real.plan()


def hits_not_told(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return [output._replace(cached_tokens=0) for output in real.commit(plan, sampled)]


def broken_logits_taken_for_a_token(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    free = ~np.isin(plan.slots, plan.mask_slots)
    return real.commit(plan, replace(sampled, ids=np.where(free, np.maximum(sampled.ids, 0), sampled.ids)))


def error_not_counted(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    outputs = real.commit(plan, sampled)
    real._results.nonfinite = 0
    return outputs


def all_rows_broken_by_one(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    if (sampled.ids == NOT_FINITE).any():
        sampled = replace(sampled, ids=np.full_like(sampled.ids, NOT_FINITE))
    return real.commit(plan, sampled)


def planned_before_its_mask(real: Scheduler) -> StepPlan | None:
    """A row whose mask is not made yet goes on with the one before."""
    real._table.awaits_mask[:] = False
    return real.plan()


def comes_back_before_its_mask(real: Scheduler) -> StepPlan | None:
    """A request that was preempted comes back with the mask before."""
    for sequence in real._waiting._queue:
        if sequence.answer is not None:
            sequence.answer._is_pending = False
    return real.plan()


def late_masks_lost(_: Scheduler, timeout_s: float = 0.0) -> list[RequestOutput]:
    return []


def late_ends_lost(real: Scheduler, timeout_s: float = 0.0) -> list[RequestOutput]:
    real.take_masks(timeout_s)
    return []


def late_masks_exchanged(real: Scheduler, timeout_s: float = 0.0) -> list[RequestOutput]:
    """Each mask that was made late goes to another request."""
    made = [s.answer for s in real._pending._late.values() if s.answer is not None and s.answer.is_made]
    masks = [answer._made for answer in made]
    for answer, mask in zip(made, masks[1:] + masks[:1], strict=True):
        answer._made = mask
    return real.take_masks(timeout_s)
