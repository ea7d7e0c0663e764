"""Who goes first, who gives way, and who may start: the scheduler's choices as functions.

Requests are served in the order of their arrival. Every request that runs arrived before every one
that waits: requests start from the head of the queue, nothing overtakes the head, and the one that
gives way is the youngest that runs. So the oldest request always makes progress, alone if need be
with all pages to itself, and each of the others becomes the oldest in its turn.
"""

from collections import OrderedDict

from albireo_jax.core.plan import CopyCosts, Int32s
from albireo_jax.sched.sequence import Sequence

_FEW_ROWS = 8
"""Rows that any step may have."""


def is_worth_copying(num_pages: int, num_tokens: int, *, costs: CopyCosts | None) -> bool:
    """Whether pages on the host are copied back, not their tokens computed again; always if nobody measured.

    Copies take nothing from the device but time on the bus, so that in doubt they are the better choice.
    """
    if costs is None:
        return True
    return num_pages * costs.page_s + costs.wait_s <= num_tokens * costs.token_s


def is_worth_waiting(num_tokens: int, *, costs: CopyCosts | None) -> bool:
    """Whether to wait for pages that a step in flight computes, and not to compute their tokens again.

    They can be read when that step is committed, as pages can that are copied from the host. Always if nobody
    measured: a token that is computed twice is taken from every other request.
    """
    return costs is None or costs.wait_s <= num_tokens * costs.token_s


def victim(running: Int32s) -> int:
    """Slot of the request that gives its pages back when there are none left: the youngest.

    `running` lists the slots oldest first. The victim may be the very request that needs a page.
    """
    return int(running[-1])


def requeue(waiting: OrderedDict[str, Sequence], sequence: Sequence) -> None:
    """Put a request that gave way back where it arrived: before all that never started."""
    waiting[sequence.request.request_id] = sequence
    waiting.move_to_end(sequence.request.request_id, last=False)


def may_start(*, num_pages: int, num_free: int, num_running: int, growth: int = 0) -> bool:
    """Whether a request that needs `num_pages` for its known tokens may start beside `num_running` others.

    Its tokens must fit whole, and one more page must be left for each request that runs, and the pages that
    all fill until its tokens are computed, their `growth`; or the new one would soon be preempted, perhaps
    before its first token, and be computed anew. A request that is alone always starts: it was refused at the
    door if it cannot fit. Simulated on 1,500 requests of the Azure conversation trace in 1,000 pages of 16
    tokens: 168 preemptions; without the page for each 378; starting whenever one chunk fits 11,529, and
    the whole took 1.7 times as long.
    """
    return num_running == 0 or num_pages + max(num_running, growth) <= num_free


def most_started(num_decoding: int) -> int | None:
    """Requests that a step may start beside `num_decoding` rows that decode; None for any number.

    They may double the rows, or make them eight: those that decode wait for the step, and its time grows with
    its rows also where their prompts are short. What starts by doubling fills any number of rows in a few
    steps. Where no row decodes, nobody's next token is late.
    """
    if not num_decoding:
        return None
    return max(num_decoding, _FEW_ROWS - num_decoding)


def has_room(num_started: int, *, num_decoding: int) -> bool:
    """Whether a step of `num_decoding` decoding rows and `num_started` others may start one more request."""
    most = most_started(num_decoding)
    return most is None or num_started < most


def most_copied(limit: int, *, costs: CopyCosts | None) -> int:
    """Pages that a step should copy to the device: what a step of one token per row has time for.

    The next step waits for them. At least one, and `limit` at most, which is all if nobody measured.
    """
    if costs is None or not costs.page_s:
        return limit
    return max(1, min(limit, int(costs.wait_s / 2 / costs.page_s)))
