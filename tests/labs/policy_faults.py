"""Faults in the order of requests: who starts first, who is preempted."""

from dataclasses import replace

from albireo_jax.core.plan import StepPlan
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.sequence import Sequence, place_of


def preempted_behind_all(real: Scheduler) -> StepPlan | None:
    queue = real._waiting
    push = queue.push

    def push_behind(sequence: Sequence) -> None:
        real._arrivals += 1
        sequence.place = (*sequence.place[:-1], real._arrivals)
        push(sequence)

    queue.push = push_behind
    plan = real.plan()
    queue.push = push
    return plan


def most_pages_preempted(real: Scheduler) -> StepPlan | None:
    """The request with the most pages is preempted, whatever its place."""

    def victim(running: list[Sequence]) -> Sequence:
        return max(running, key=lambda sequence: real._table.num_pages[sequence.slot])

    real._policy = replace(real._policy, victim=victim)
    return real.plan()


def youngest_started(real: Scheduler) -> StepPlan | None:
    """The first two that wait change places."""
    queue, first = real._waiting, real._waiting._queue.first
    if len(first) < 2:
        return real.plan()
    pop = queue.pop

    def pop_second(*args, **fields):
        first[:2] = first[1::-1]
        popped = pop(*args, **fields)
        if popped is None:
            first[:2] = first[1::-1]
        return popped

    queue.pop = pop_second
    plan = real.plan()
    queue.pop = pop
    first.sort(key=place_of)
    return plan
