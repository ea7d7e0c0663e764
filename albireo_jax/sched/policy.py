"""The choices of the scheduler as functions: who starts first, who is preempted, who may start.

A `Policy` is given to the scheduler. Its `order` gives each request a place. Requests start from the head of
the waiting queue, and nothing overtakes the head. Its `victim` says which request is preempted when one that
runs needs a page and none is left: the last in the same order. A request that waits preempts none; it starts
when there is room::

    priority     waiting          running
                 a 0   d 5        b 1   c 5   e 9     pages run out: e is preempted
                 a 0   d 5   e 9  b 1   c 5           a starts as soon as there is room for it

Every request ends if no more arrive. The lowest place that runs is never preempted while others run, so it
makes progress, alone if need be with all pages to itself. When it has ended, the next lowest follows. Under
FCFS each request becomes the lowest in its turn. Under PRIORITY a request waits for as long as requests of
better priority keep arriving.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from albireo_jax.core.config import SchedulingPolicy
from albireo_jax.core.plan import CopyCosts
from albireo_jax.core.types import Request
from albireo_jax.sched.sequence import Place, Sequence

_FEW_ROWS = 8
"""Rows that any step may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An order of requests, and a choice among those that run.

    `order` is called once, when a request arrives, and gives its place for life: the lowest place starts
    first, and the earlier of two that are equal. `victim` is given the requests that run, the lowest place
    first. It must not choose the first one while others run, or no request might ever end.
    """

    order: Callable[[Request], Place]
    victim: Callable[[Ordered[Sequence]], Sequence]


def by_arrival(request: Request) -> Place:
    """The same place for all requests: the earliest goes first."""
    del request
    return ()


def by_priority(request: Request) -> Place:
    """The lowest `priority` goes first."""
    return (request.priority,)


def last_in_order(running: Ordered[Sequence]) -> Sequence:
    """The request of the highest place; it may be the very one that needs a page."""
    return running[-1]


FCFS = Policy(order=by_arrival, victim=last_in_order)

POLICIES = {
    SchedulingPolicy.FCFS: FCFS,
    SchedulingPolicy.PRIORITY: Policy(order=by_priority, victim=last_in_order),
}
"""The policies that a configuration can name."""


def is_worth_copying(num_pages: int, num_tokens: int, *, costs: CopyCosts | None) -> bool:
    """Whether pages on the host are copied back, not their tokens computed again; always without `costs`.

    Copies take nothing from the device but time on the bus, so that in doubt they are the better choice.
    """
    if costs is None:
        return True
    return num_pages * costs.page_s + costs.wait_s <= num_tokens * costs.token_s


def is_worth_waiting(num_tokens: int, *, costs: CopyCosts | None) -> bool:
    """Whether to wait for pages that a step in flight computes, and not to compute their tokens again.

    They can be read when that step is committed, as pages can that are copied from the host. Always without
    `costs`: a token that is computed twice is taken from every other request.
    """
    return costs is None or costs.wait_s <= num_tokens * costs.token_s


def may_start(*, num_pages: int, num_free: int, num_running: int, growth: int = 0) -> bool:
    """Whether a request that needs `num_pages` for its known tokens may start beside `num_running` others.

    Its tokens must fit whole. Besides, a page must be left for each request that runs, or the pages that all
    fill until its tokens are computed, their `growth`. Otherwise it would soon be preempted, perhaps before
    its first token, and be computed anew. A request that is alone always starts: one that cannot fit was
    refused when it was added.
    """
    return num_running == 0 or num_pages + max(num_running, growth) <= num_free


def most_started(num_decoding: int) -> int | None:
    """Requests that a step may start beside `num_decoding` rows that decode; None for any number.

    They may double the rows, or make them eight: rows that decode wait for the step, and its time grows with
    its rows also where their prompts are short. Doubling fills any number of rows in a few steps. No token is
    late where no row decodes.
    """
    if not num_decoding:
        return None
    return max(num_decoding, _FEW_ROWS - num_decoding)


def has_room(num_started: int, *, num_decoding: int) -> bool:
    """Whether a step of `num_decoding` decoding rows and `num_started` others may start one more request."""
    most = most_started(num_decoding)
    return most is None or num_started < most


def most_copied(limit: int, *, costs: CopyCosts | None) -> int:
    """Pages that a step should copy to the device: as many as a step of one token per row has time for.

    The next step waits for them. There is at least one, and `limit` at most; without `costs` it is `limit`.
    """
    if costs is None or not costs.page_s:
        return limit
    return max(1, min(limit, int(costs.wait_s / 2 / costs.page_s)))
