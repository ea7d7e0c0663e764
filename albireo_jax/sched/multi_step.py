"""Plans of several steps: when rows may go on by themselves, and how their tokens are taken in.

A row goes on for several steps if the host has nothing to do between two of its tokens: it has no mask and no
rule that depends on them, and no scores that other programs find. Besides, neither a request nor a chunk of a
prompt may wait for the next step. Stop strings do not matter: they are found in the text, off the engine's
thread, after the token that completes them was sampled, however many steps a plan has.

A plan of several steps does what as many plans of one step would do, and it is committed that way. Only the
pages of all its steps are taken before the first one. A row that goes on needs them all, so none is given
back; a row that ends releases all that it has. If there are too few pages, the plan has one step, so that no
request is preempted for a token that may never come::

    4 steps, pages of 3 tokens    before    planned    committed
      goes on                     aa|aa     aa|aab|b   the same, 3 pages: those of its tokens
      ends at its 2nd token       aa|aa     aa|aab|b   none
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import Int32s, SampledTokens, StepPlan
from albireo_jax.sched.sequence import Sequence, SlotTable


class PagePlaces(NamedTuple):
    """Entries of page tables, ascending within a slot."""

    slots: Int32s
    columns: Int32s


_NO_STEPS = np.zeros(0, np.int32)
_NO_PLACES = PagePlaces(_NO_STEPS, _NO_STEPS)


def steps_of(rows: Int32s, table: SlotTable, *, most: int, num_available: int) -> tuple[Int32s, PagePlaces]:
    """How many steps each of the slots in `rows`, which all decode, can take by itself, and its new pages.

    There are no steps, which means one each, if that needs more pages than are available.
    """
    if not table.repeats[rows].all():
        return _NO_STEPS, _NO_PLACES
    steps = np.minimum(most, table.limit[rows] - table.length[rows])
    places = missing_pages(rows, steps, table)
    if steps.max(initial=1) == 1 or len(places.slots) > num_available:
        return _NO_STEPS, _NO_PLACES
    return steps, places


def missing_pages(rows: Int32s, steps: Int32s, table: SlotTable) -> PagePlaces:
    """Places in the page tables of `rows` that so many steps reach and that have no page yet."""
    held = table.num_pages[rows]
    counts = -(-(table.computed[rows] + steps) // table.page_size) - held
    nth = np.arange(counts.sum(), dtype=np.int32) - np.repeat(
        np.cumsum(counts, dtype=np.int32) - counts, counts
    )
    return PagePlaces(rows.repeat(counts), held.repeat(counts) + nth)


def single_steps(plan: StepPlan, sampled: SampledTokens) -> Iterator[tuple[StepPlan, SampledTokens]]:
    """The steps of a plan one by one, each with the results of the rows that took it."""
    if not len(plan.steps):
        yield plan, sampled
        return
    for step in range(int(sampled.counts.max())):
        rows = np.flatnonzero(sampled.counts > step).astype(np.int32)
        yield (
            plan.nth_step(step, rows),
            SampledTokens(ids=sampled.ids[step, rows], finished_s=sampled.finished_s),
        )


def check_ends(plan: StepPlan, sampled: SampledTokens, live: Mapping[str, Sequence]) -> None:
    """Assert that the device ended only rows whose requests have ended, or are no longer awaited."""
    for row in np.flatnonzero(sampled.counts < plan.steps).tolist() if len(plan.steps) else ():
        sequence = live.get(plan.request_ids[row])
        is_awaited = sequence is not None and sequence.epoch == plan.epochs[row]
        assert not is_awaited, (
            f"request {plan.request_ids[row]} took {sampled.counts[row]} steps, and goes on"
        )
