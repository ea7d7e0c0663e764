"""What must be true of every run of any scheduler: functions of a journal that raise AssertionError."""

from sched_lab import Journal, alone

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.core.types import FinishReason, Request, RequestOutput


def requests_finish(journal: Journal) -> None:
    """Each ends once, at its length or at its first stop token but not before min_tokens; nothing follows."""
    aborted = {journal.case.requests[index].request_id for _, index in journal.case.aborts}
    for request in journal.case.requests:
        outputs = journal.outputs(request)
        reasons = [output.finish_reason for output in outputs]
        assert None not in reasons[-1:], f"{request.request_id} never ends"
        assert reasons, f"{request.request_id} has no output"
        assert reasons[:-1] == [None] * (len(reasons) - 1), f"{request.request_id} goes on after its end"
        tokens = journal.tokens(request)
        stops = [index for index, token in enumerate(tokens) if token in request.stop_ids]
        match reasons[-1]:
            case FinishReason.LENGTH:
                assert len(tokens) == request.max_tokens
                assert not stops
            case FinishReason.STOP:
                assert stops == [len(tokens) - 1]
                assert request.min_tokens < len(tokens) <= request.max_tokens
            case reason:
                assert reason is FinishReason.ABORT
                assert request.request_id in aborted


def nothing_leaks(journal: Journal) -> None:
    """No page, slot or request is left over once the last request has its answer, and after that."""
    for stats in (journal.stats_when_answered, journal.stats):
        assert stats is not None, "some request was never answered"
        assert (stats.pages_in_use, stats.running, stats.waiting, stats.finishing) == (0, 0, 0, 0)


def tokens_are_those_alone(journal: Journal) -> None:
    """Depth, memory, batch mates, chunks, preemption and others' aborts change no token."""
    for request in journal.case.requests:
        tokens = tuple(journal.tokens(request))
        expected = alone(request)
        if journal.outputs(request)[-1].finish_reason is FinishReason.ABORT:
            expected = expected[: len(tokens)]
        assert tokens == expected, request.request_id


def order_is_fair(journal: Journal) -> None:
    """A step computes the oldest requests that have something to compute; none is passed over."""
    live: list[str] = []
    planned_all: set[str] = set()
    limits: dict[str, int] = {}
    for event in journal.events:
        if isinstance(event, Request):
            live.append(event.request_id)
            limits[event.request_id] = len(event.prompt_token_ids) + event.max_tokens
        elif isinstance(event, RequestOutput):
            if event.finish_reason is not None and event.request_id in live:
                live.remove(event.request_id)
        else:
            waiting = [request_id for request_id in live if request_id not in planned_all]
            assert list(event.request_ids) == waiting[: event.num_rows]
            ends = (event.starts + event.counts).tolist()
            planned_all |= {r for r, end in zip(event.request_ids, ends, strict=True) if end == limits[r] - 1}


def budgets_hold(journal: Journal) -> None:
    """A step stays within its tokens and rows and computes something; no row passes its request's end."""
    limits = {r.request_id: len(r.prompt_token_ids) + r.max_tokens for r in journal.case.requests}
    for plan in journal.plans:
        assert 0 < plan.num_tokens <= journal.house.max_step_tokens
        assert plan.num_tokens == plan.counts.sum()
        assert plan.num_rows <= journal.house.max_rows
        assert (plan.counts > 0).all()
        assert len(set(plan.slots.tolist())) == plan.num_rows
        ends = (plan.starts + plan.counts).tolist()
        assert all(end < limits[r] for r, end in zip(plan.request_ids, ends, strict=True))


def pages_are_exact(journal: Journal) -> None:
    """A row holds the pages of its tokens and no more, none of them the null page or another row's."""
    tables: dict[int, dict[int, int]] = {}
    epochs: dict[int, int] = {}
    for plan in journal.plans:
        for slot, epoch in zip(plan.slots.tolist(), plan.epochs.tolist(), strict=True):
            if epochs.get(slot) != epoch:
                epochs[slot], tables[slot] = epoch, {}
        updates = (plan.update_slots, plan.update_columns, plan.update_pages)
        for slot, column, page in zip(*(array.tolist() for array in updates), strict=True):
            tables[slot][column] = page
        used: list[int] = []
        for slot, end in zip(plan.slots.tolist(), (plan.starts + plan.counts).tolist(), strict=True):
            assert sorted(tables[slot]) == list(range(-(-end // journal.house.page_size)))
            used += tables[slot].values()
        assert len(set(used)) == len(used), "two rows share a page"
        assert all(NULL_PAGE < page <= journal.house.num_pages for page in used)


def nothing_is_wasted(journal: Journal) -> None:
    """Without preemption, a token is computed once, and the last token of a request not at all."""
    assert journal.stats is not None
    if journal.stats.preemptions:
        return
    computed: dict[str, int] = dict.fromkeys((r.request_id for r in journal.case.requests), 0)
    for plan in journal.plans:
        for request_id, start, count in zip(
            plan.request_ids, plan.starts.tolist(), plan.counts.tolist(), strict=True
        ):
            assert start == computed[request_id]
            computed[request_id] += count
    for request in journal.case.requests:
        if journal.outputs(request)[-1].finish_reason is FinishReason.LENGTH:
            assert computed[request.request_id] == len(request.prompt_token_ids) + request.max_tokens - 1


LAWS = (
    requests_finish,
    nothing_leaks,
    tokens_are_those_alone,
    order_is_fair,
    budgets_hold,
    pages_are_exact,
    nothing_is_wasted,
)
