"""Laws of every run of any scheduler: functions of a journal that raise AssertionError."""

from albireo_jax.core.plan import NULL_PAGE, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.policy import FCFS
from tests.labs.prefix_laws import hits_were_seen_before, no_page_is_computed_twice, nobody_waits_in_vain
from tests.labs.sched_lab import (
    Bond,
    Journal,
    MaskAwaited,
    MaskMade,
    Preempted,
    Result,
    alone,
    mask_of,
    run_alone,
)


def may_follow(request: Request, bond: Bond, tokens: list[int]) -> list[int]:
    """The tokens that may follow `tokens` in a bound request, without stop tokens before min_tokens."""
    banned = request.stop_ids if len(tokens) < request.min_tokens else ()
    return [token for token in bond.allowed(tuple(tokens)) if token not in banned]


def requests_finish(journal: Journal) -> None:
    """Each ends once, and nothing follows.

    It ends at its length, at its first stop token but not before min_tokens, where its rule allows nothing
    more, or where its rule or its logits fail.
    """
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
            case FinishReason.STOP if stops:
                assert stops == [len(tokens) - 1]
                assert request.min_tokens < len(tokens) <= request.max_tokens
            case FinishReason.STOP:
                assert not may_follow(request, journal.case.bond(request), tokens)
            case FinishReason.ERROR:
                bond = journal.case.bond(request)
                assert len(tokens) in (bond.fails_after, bond.breaks_after)
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
        expected = alone(request, journal.case.bond(request))
        if journal.outputs(request)[-1].finish_reason is FinishReason.ABORT:
            expected = expected[: len(tokens)]
        assert tokens == expected, request.request_id


def scores_are_those_alone(journal: Journal) -> None:
    """A token has scores if they were asked for, the first also the prompt's: nothing changes any of them."""
    for request in journal.case.requests:
        scores, tokens = journal.scores(request), journal.tokens(request)
        expected = run_alone(request, journal.case.bond(request)).scores(request)
        wants = request.logprobs is not None or request.prompt_logprobs is not None
        assert [row is not None for row in scores.token] == [wants] * len(tokens), request.request_id
        assert scores.token == expected.token[: len(tokens)], request.request_id
        assert not scores.prompt_comes_late
        if tokens and wants:
            assert scores.prompt == expected.prompt
            count = 0 if request.prompt_logprobs is None else len(request.prompt_token_ids) - 1
            assert len(scores.prompt or []) == count


def order_is_fair(journal: Journal) -> None:
    """Under FCFS a step computes the oldest requests that have something to compute; none is passed over.

    A bound request has nothing to compute while a token of it is on its way.
    """
    if journal.house.policy is not FCFS:
        return
    live: list[str] = []
    awaited: dict[str, StepPlan | MaskAwaited] = {}
    bound = {request.request_id for request in journal.case.requests if journal.case.bond(request).modulus}
    planned_all: set[str] = set()
    limits: dict[str, int] = {}
    for event in journal.events:
        if isinstance(event, Request):
            live.append(event.request_id)
            limits[event.request_id] = len(event.prompt_token_ids) + event.max_tokens
        elif isinstance(event, RequestOutput):
            if event.finish_reason is not None and event.request_id in live:
                live.remove(event.request_id)
        elif isinstance(event, Result):
            awaited = {request_id: plan for request_id, plan in awaited.items() if plan is not event.plan}
        elif isinstance(event, MaskAwaited):
            awaited[event.request_id] = event
        elif isinstance(event, MaskMade):
            awaited.pop(event.request_id, None)
        elif isinstance(event, StepPlan):
            for request_id in _admitted(event):
                awaited.pop(request_id, None)  # it was preempted, and what is on its way is dropped
            waiting = [request_id for request_id in live if request_id not in planned_all | awaited.keys()]
            assert list(event.request_ids) == waiting[: event.num_rows]
            awaited |= {r: event for r, samples in _samples(event) if samples and r in bound}
            ends = (event.starts + event.counts).tolist()
            planned_all |= {r for r, end in zip(event.request_ids, ends, strict=True) if end == limits[r] - 1}


def order_is_kept(journal: Journal) -> None:
    """No request starts before one that waits and has a lower place; the highest that runs is preempted."""
    place = {request.request_id: journal.place(request) for request in journal.case.requests}
    waiting: set[str] = set()
    for event in journal.events:
        if isinstance(event, Request):
            waiting.add(event.request_id)
        elif isinstance(event, RequestOutput) and event.finish_reason is not None:
            waiting.discard(event.request_id)
        elif isinstance(event, Preempted):
            last = max(event.running, key=place.__getitem__)
            assert event.is_forced or event.request_id == last, f"{event.request_id} is preempted, not {last}"
            assert event.is_forced or len(event.running) > 1, f"{last} is preempted though it runs alone"
            waiting.add(event.request_id)
        elif isinstance(event, StepPlan):
            for request_id in _admitted(event):
                first = min(waiting, key=place.__getitem__)
                assert request_id == first, f"{request_id} starts before {first}"
                waiting.remove(request_id)


def budgets_hold(journal: Journal) -> None:
    """A step stays within its tokens and rows and computes something; no row passes its request's end."""
    limits = {r.request_id: len(r.prompt_token_ids) + r.max_tokens for r in journal.case.requests}
    for plan in journal.plans:
        assert plan.num_tokens or plan.copies.to_device
        assert plan.num_tokens <= journal.house.max_step_tokens
        assert plan.num_tokens == plan.counts.sum()
        assert plan.num_rows <= journal.house.max_rows
        assert (plan.counts > 0).all()
        assert len(set(plan.slots.tolist())) == plan.num_rows
        ends = (plan.starts + plan.counts).tolist()
        assert all(end < limits[r] for r, end in zip(plan.request_ids, ends, strict=True))


def pages_are_exact(journal: Journal) -> None:
    """A row holds the pages of its tokens and no more, and writes to none of another row."""
    tables: dict[int, dict[int, int]] = {}
    page_size = journal.house.page_size
    for plan in journal.plans:
        for params in plan.new_slots:
            tables[params.slot] = dict(enumerate(params.pages))
        updates = (plan.update_slots, plan.update_columns, plan.update_pages)
        for slot, column, page in zip(*(array.tolist() for array in updates), strict=True):
            tables[slot][column] = page
        read: list[int] = []
        written: list[int] = []
        rows = zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True)
        for slot, start, count in rows:
            assert sorted(tables[slot]) == list(range(-(-(start + count) // page_size)))
            read += {page for column, page in tables[slot].items() if (column + 1) * page_size <= start}
            written += {page for column, page in tables[slot].items() if (column + 1) * page_size > start}
        assert len(set(written)) == len(written), "two rows write to a page"
        assert not {*written} & {*read}, "a row writes to a page of another"
        assert all(NULL_PAGE < page <= journal.house.num_pages for page in (*read, *written))


def copies_are_timely(journal: Journal) -> None:
    """Copies stay within both tiers and have targets of their own; no row has a page that is on its way."""
    tables: dict[int, dict[int, int]] = {}
    for plan in journal.plans:
        copies = plan.copies
        out, back = [host for _, host in copies.to_host], [page for _, page in copies.to_device]
        assert len({*out}) == len(out)
        assert len({*back}) == len(back) <= journal.house.max_copied_pages
        assert all(
            0 < host <= journal.house.num_host_pages for host in (*out, *(h for h, _ in copies.to_device))
        )
        assert all(
            NULL_PAGE < page <= journal.house.num_pages for page in (*back, *(p for p, _ in copies.to_host))
        )
        for params in plan.new_slots:
            tables[params.slot] = dict(enumerate(params.pages))
        updates = (plan.update_slots, plan.update_columns, plan.update_pages)
        for slot, column, page in zip(*(array.tolist() for array in updates), strict=True):
            tables.setdefault(slot, {})[column] = page
        assert not {*back} & {page for slot in plan.slots.tolist() for page in tables[slot].values()}


def nothing_is_wasted(journal: Journal) -> None:
    """Without preemption, a token is computed once or found in full pages, and the last one not at all."""
    assert journal.stats is not None
    if journal.stats.preemptions:
        return
    computed: dict[str, int] = {}
    for plan in journal.plans:
        for request_id, start, count in zip(
            plan.request_ids, plan.starts.tolist(), plan.counts.tolist(), strict=True
        ):
            if request_id not in computed:
                assert start % journal.house.page_size == 0
                assert journal.house.shares_prefixes or start == 0
            assert start == computed.get(request_id, start)
            computed[request_id] = start + count
    for request in journal.case.requests:
        if journal.outputs(request)[-1].finish_reason is FinishReason.LENGTH:
            assert computed[request.request_id] == len(request.prompt_token_ids) + request.max_tokens - 1


def masks_follow_tokens(journal: Journal) -> None:
    """A bound row that samples has the mask of all its tokens, which are all known; no other row has one."""
    requests = {request.request_id: request for request in journal.case.requests}
    said: dict[str, list[int]] = {request_id: [] for request_id in requests}
    for event in journal.events:
        if isinstance(event, RequestOutput) and event.token_id is not None:
            said[event.request_id].append(event.token_id)
        elif isinstance(event, StepPlan):
            masks: dict[int, list[int]] = {}
            for row, (request_id, samples) in enumerate(_samples(event)):
                request, tokens = requests[request_id], said[request_id]
                bond = journal.case.bond(request)
                if samples and bond.modulus:
                    position = len(request.prompt_token_ids) + len(tokens)
                    assert event.starts[row] + event.counts[row] == position
                    masks[int(event.slots[row])] = mask_of(may_follow(request, bond, tokens)).tolist()
            assert event.mask_slots.tolist() == list(masks)
            assert event.masks.tolist() == list(masks.values())


def answers_follow_rules(journal: Journal) -> None:
    """Each token of a bound request is one that its rule allows there."""
    for request in journal.case.requests:
        bond, tokens = journal.case.bond(request), journal.tokens(request)
        if bond.modulus:
            assert all(token in may_follow(request, bond, tokens[:i]) for i, token in enumerate(tokens))


def errors_are_counted(journal: Journal) -> None:
    """A request whose logits are not finite ends with an error and without a token, and is counted."""
    broken = 0
    for request in journal.case.requests:
        bond, output = journal.case.bond(request), journal.outputs(request)[-1]
        sampled = len(journal.tokens(request))
        if output.finish_reason is FinishReason.ERROR and sampled == bond.breaks_after != bond.fails_after:
            assert output.token_id is None
            broken += 1
    assert journal.stats is not None
    assert journal.stats.nonfinite == broken


def no_row_is_delayed(journal: Journal) -> None:
    """Without preemption, a row that decodes is in every step, but for one that awaits its token."""
    assert journal.stats is not None
    if journal.stats.preemptions:
        return
    decoding: dict[str, int] = {}
    awaited: dict[str, StepPlan | MaskAwaited] = {}
    limits = {r.request_id: len(r.prompt_token_ids) + r.max_tokens for r in journal.case.requests}
    bonds = {request.request_id: journal.case.bond(request) for request in journal.case.requests}
    for event in journal.events:
        if isinstance(event, RequestOutput):
            if event.finish_reason is not None:
                decoding.pop(event.request_id, None)
        elif isinstance(event, Result):
            awaited = {request_id: plan for request_id, plan in awaited.items() if plan is not event.plan}
        elif isinstance(event, MaskAwaited):
            awaited[event.request_id] = event
        elif isinstance(event, MaskMade):
            awaited.pop(event.request_id, None)
        elif isinstance(event, StepPlan):
            assert decoding.keys() - awaited.keys() <= set(event.request_ids)
            ends = (event.starts + event.counts).tolist()
            for (request_id, samples), end in zip(_samples(event), ends, strict=True):
                assert request_id not in awaited
                if samples and end < limits[request_id] - 1:
                    decoding[request_id] = end
                    awaited |= {request_id: event} if bonds[request_id].modulus else {}
                else:
                    decoding.pop(request_id, None)


def _admitted(plan: StepPlan) -> list[str]:
    new_slots = {params.slot for params in plan.new_slots}
    rows = zip(plan.request_ids, plan.slots.tolist(), strict=True)
    return [request_id for request_id, slot in rows if slot in new_slots]


def _samples(plan: StepPlan) -> list[tuple[str, bool]]:
    return list(zip(plan.request_ids, plan.samples.tolist(), strict=True))


LAWS = (
    requests_finish,
    nothing_leaks,
    tokens_are_those_alone,
    scores_are_those_alone,
    order_is_fair,
    order_is_kept,
    budgets_hold,
    pages_are_exact,
    copies_are_timely,
    hits_were_seen_before,
    no_page_is_computed_twice,
    nobody_waits_in_vain,
    nothing_is_wasted,
    masks_follow_tokens,
    answers_follow_rules,
    errors_are_counted,
    no_row_is_delayed,
)
