"""Laws of the prefixes that a scheduler finds: functions of a journal that raise AssertionError."""

from albireo_jax.core.plan import NOT_FINITE, TOKEN_ON_DEVICE, StepPlan
from albireo_jax.core.types import Request, RequestOutput
from tests.labs.sched_lab import Journal, Result

Key = tuple[str, tuple[int, ...]]
"""Who may find it, and the tokens that full pages hold."""


class Prefixes:
    """The contents of full pages as a journal is read, if no page is ever evicted.

    `committed` keys were computed by committed steps, and no prompt that begins with them was found to be not
    finite before a token was sampled behind them (`proven`). `in_flight` are those of chunks of known tokens
    whose steps are not committed, by plan.
    """

    def __init__(self, journal: Journal) -> None:
        self.page_size = journal.house.page_size
        self.requests = {request.request_id: request for request in journal.case.requests}
        self.shares = journal.house.shares_prefixes
        self.known: dict[str, tuple[int, ...]] = {}
        self.committed: set[Key] = set()
        self.proven: set[Key] = set()
        self.in_flight: dict[int, list[Key]] = {}
        self.ended: frozenset[str] = frozenset()
        self.results: list[tuple[Result, frozenset[str]]] = []

    def read(self, event: object) -> None:
        """Take in an event that is no plan, or a result."""
        if isinstance(event, Request):
            self.known[event.request_id] = tuple(map(int, event.prompt_token_ids))
        elif isinstance(event, RequestOutput) and event.token_id is not None:
            self.known[event.request_id] += (event.token_id,)
        elif isinstance(event, Result):
            self.results.append((event, self.ended))
            self.in_flight.pop(event.plan.step, None)
        if isinstance(event, RequestOutput) and event.finish_reason is not None:
            self.ended |= {event.request_id}

    def commit(self) -> None:
        """Take in the results whose outputs have been read; what follows the end of an answer is dropped."""
        for result, ended in self.results:
            for row, request_id in enumerate(result.plan.request_ids):
                if request_id not in ended or not self.is_decode(result.plan, row):
                    self._commit_row(result, row)
        self.results = []

    def keys(self, request_id: str, first: int, end: int) -> list[Key]:
        """The keys of a request's full pages behind its `first` tokens, up to `end` tokens."""
        scope = self.requests[request_id].cache_salt if self.shares else request_id
        tokens, size = self.known[request_id], self.page_size
        ends = range((first // size + 1) * size, min(end, len(tokens)) + 1, size)
        return [(scope, tokens[:last]) for last in ends]

    def dispatch(self, plan: StepPlan, row: int) -> None:
        """Note that a row is on its way."""
        if not self.is_decode(plan, row):
            start, count = int(plan.starts[row]), int(plan.counts[row])
            keys = self.keys(plan.request_ids[row], start, start + count)
            self.in_flight.setdefault(plan.step, []).extend(keys)

    def useful(self, request_id: str) -> list[Key]:
        """The keys of its prompt that a request could find; none if it wants the prompt's scores."""
        request = self.requests[request_id]
        if request.prompt_logprobs is not None:
            return []
        return self.keys(request_id, 0, min(len(request.prompt_token_ids), len(self.known[request_id]) - 1))

    def findable(self, request_id: str) -> list[Key]:
        """The keys of its prompt that a request must find: the useful ones up to the first not committed."""
        useful = self.useful(request_id)
        missing = (at for at, key in enumerate(useful) if key not in self.committed)
        return useful[: next(missing, len(useful))]

    def awaits(self, request_id: str) -> bool:
        """Whether the next page that it could find is on its way."""
        behind = self.useful(request_id)[len(self.findable(request_id)) :]
        in_flight = [key for keys in self.in_flight.values() for key in keys]
        return self.shares and bool(behind) and behind[0] in in_flight

    @staticmethod
    def is_decode(plan: StepPlan, row: int) -> bool:
        return bool(plan.token_ids[int(plan.counts[:row].sum())] == TOKEN_ON_DEVICE)

    def _commit_row(self, result: Result, row: int) -> None:
        plan, sampled = result.plan, result.sampled
        steps = int(sampled.counts[row]) if len(plan.steps) else 1
        if not steps:
            return
        ids = sampled.ids[:steps, row] if len(plan.steps) else sampled.ids[row : row + 1]
        is_finite = not plan.samples[row] or bool((ids != NOT_FINITE).all())
        keys = self.keys(plan.request_ids[row], 0, int(plan.starts[row] + plan.counts[row]) + steps - 1)
        if is_finite:
            self.committed.update(keys)
            if plan.samples[row]:
                self.proven.update(keys)
        elif not self.is_decode(plan, row):
            for scope, tokens in [key for key in keys if key not in self.proven][:1]:
                gone = {key for key in self.committed if key[0] == scope and key[1][: len(tokens)] == tokens}
                self.committed -= gone
                self.proven -= gone


def hits_were_seen_before(journal: Journal) -> None:
    """A request starts behind tokens only if a committed step computed them for one that shares with it.

    They are not those of a prompt that turned out not finite, nor behind such. The first token of a request
    says how many of its prompt were found.
    """
    prefixes = Prefixes(journal)
    found: dict[str, int] = {}
    for event in journal.events:
        if isinstance(event, StepPlan):
            prefixes.commit()
            for row in admitted_rows(event):
                request_id, start = event.request_ids[row], int(event.starts[row])
                found.setdefault(request_id, start)
                assert start % journal.house.page_size == 0
                keys = prefixes.keys(request_id, 0, start)
                assert {*keys} <= prefixes.committed, f"{request_id} starts behind {start} tokens"
        elif isinstance(event, RequestOutput) and event.token_id is not None:
            request = prefixes.requests[event.request_id]
            is_first = len(prefixes.known[event.request_id]) == len(request.prompt_token_ids)
            assert event.cached_tokens == (found[event.request_id] if is_first else 0)
        prefixes.read(event)


def no_page_is_computed_twice(journal: Journal) -> None:
    """With pages for all, a request starts behind all that is known of its prompt, or waits for it.

    It does not start while a page that it would compute is on its way. Only the last token's page, and the
    prompt of a request that wants its scores, are computed whatever is known.
    """
    if not has_pages_for_all(journal):
        return
    prefixes = Prefixes(journal)
    for event in journal.events:
        if isinstance(event, StepPlan):
            prefixes.commit()
            admitted = admitted_rows(event)
            for row in range(event.num_rows):
                if row in admitted:
                    request_id, start = event.request_ids[row], int(event.starts[row])
                    expected = len(prefixes.findable(request_id)) * journal.house.page_size
                    assert start >= expected, f"{request_id} starts at {start}"
                    assert not prefixes.awaits(request_id), f"{request_id} does not wait"
                prefixes.dispatch(event, row)
        prefixes.read(event)


def nobody_waits_in_vain(journal: Journal) -> None:
    """With pages for all, a request waits for a slot, for tokens of the step, or for a page on its way."""
    if not has_pages_for_all(journal):
        return
    prefixes = Prefixes(journal)
    waiting: list[str] = []
    running: dict[str, int] = {}  # the length at which it leaves its slot
    if journal.stats is None or journal.stats.preemptions:
        return
    for event in journal.events:
        if isinstance(event, StepPlan):
            prefixes.commit()
            for row in admitted_rows(event):
                request = prefixes.requests[event.request_ids[row]]
                waiting.remove(request.request_id)
                running[request.request_id] = len(request.prompt_token_ids) + request.max_tokens
            for row in range(event.num_rows):
                prefixes.dispatch(event, row)
            is_full = event.num_tokens == journal.house.max_step_tokens
            if waiting and not is_full and len(running) < journal.house.max_rows:
                assert prefixes.awaits(waiting[0]), f"{waiting[0]} waits for nothing in step {event.step}"
            for request_id, end in zip(
                event.request_ids, (event.starts + event.counts).tolist(), strict=True
            ):
                if end == running[request_id] - 1:
                    del running[request_id]
        elif isinstance(event, Request):
            waiting.append(event.request_id)
            waiting.sort(key=lambda request_id: journal.place(prefixes.requests[request_id]))
        elif isinstance(event, RequestOutput) and event.finish_reason is not None:
            running.pop(event.request_id, None)
            waiting = [request_id for request_id in waiting if request_id != event.request_id]
        prefixes.read(event)


def has_pages_for_all(journal: Journal) -> bool:
    """Whether all requests fit side by side, and none was found to be not finite: nothing is evicted."""
    assert journal.stats is not None
    size = journal.house.page_size
    ends = [len(request.prompt_token_ids) + request.max_tokens for request in journal.case.requests]
    return sum(-(-end // size) + 1 for end in ends) <= journal.house.num_pages and not journal.stats.nonfinite


def admitted_rows(plan: StepPlan) -> list[int]:
    new_slots = {params.slot for params in plan.new_slots}
    return [row for row, slot in enumerate(plan.slots.tolist()) if slot in new_slots]
