"""Prompts that begin alike are computed once, by whichever request comes first and whatever becomes of it."""

from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import NOT_FINITE, CopyCosts, SampledTokens, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.prefix_tree import packed_digests
from albireo_jax.sched.scheduler import Scheduler

PAGE = 4
PROMPT = tuple(range(40))


def request(request_id: str, prompt: tuple[int, ...] = PROMPT, **fields) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, **{"max_tokens": 3, **fields})


class Engine:
    """A scheduler with up to `depth` plans in flight, and what it computed of each request."""

    def __init__(self, *, depth: int = 2, num_pages: int = 200, max_step_tokens: int = 12, **options) -> None:
        limits = EngineLimits(max_model_len=80, vocab_size=100, num_pages=num_pages, page_size=PAGE)
        config = SchedulerConfig(max_rows=6, max_step_tokens=max_step_tokens, depth=depth)
        self.scheduler = Scheduler(config, limits, **options)
        self.depth = depth
        self.in_flight: deque[StepPlan] = deque()
        self.computed: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.outputs: list[RequestOutput] = []

    def add(self, *requests: Request) -> "Engine":
        for each in requests:
            self.scheduler.add(each)
        return self

    def plan(self) -> StepPlan | None:
        """The next plan, put in flight."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.in_flight.append(plan)
            self.computed.update(dict(zip(plan.request_ids, plan.counts.tolist(), strict=True)))
        self.scheduler.check_invariants()
        return plan

    def commit(self) -> None:
        """Take in the oldest plan's tokens, those of broken requests not finite."""
        plan = self.in_flight.popleft()
        ids = [NOT_FINITE if name in self.broken else 50 for name in plan.request_ids]
        sampled = SampledTokens(ids=np.array(ids, np.int32), finished_s=0.0)
        self.outputs += self.scheduler.commit(plan, sampled)
        self.scheduler.check_invariants()

    def step(self) -> None:
        if self.plan() is None or len(self.in_flight) == self.depth:
            self.commit()

    def drain(self) -> "Engine":
        for _ in range(500):
            if not self.scheduler.has_work and not self.in_flight:
                break
            self.step()
        self.scheduler.check_idle()
        return self

    def cached(self, request_id: str) -> int:
        """Tokens of the request's prompt that were found in the cache, as its first output says."""
        return next(output.cached_tokens for output in self.outputs if output.request_id == request_id)

    def prompt_tokens(self, request_id: str) -> int:
        """Tokens of its prompt that were computed, as often as they were."""
        answered = [output for output in self.outputs if output.request_id == request_id]
        return self.computed[request_id] - max(0, len(answered) - 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("max_step_tokens", [12, 48, 500])
def test_equal_prompts_are_computed_once(depth: int, count: int, max_step_tokens: int) -> None:
    """All but the first compute the page of their last token."""
    engine = Engine(depth=depth, max_step_tokens=max_step_tokens)
    names = [f"r{index}" for index in range(count)]
    engine.add(*(request(name) for name in names)).drain()
    assert [engine.prompt_tokens(name) for name in names] == [len(PROMPT)] + [PAGE] * (count - 1)
    assert [engine.cached(name) for name in names] == [0] + [len(PROMPT) - PAGE] * (count - 1)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_a_request_waits_only_until_the_page_is_there(depth: int) -> None:
    """No longer than the steps that are planned, and whoever stands behind it waits as well."""
    engine = Engine(depth=depth, max_step_tokens=500).add(request("a", max_tokens=20), request("b"))
    engine.add(request("c", tuple(range(60, 64))))
    started = 0
    for step in range(40):
        plan = engine.plan()
        if plan is not None and "b" in plan.request_ids:
            started = step
            assert "c" in plan.request_ids
            break
        assert plan is None or "c" not in plan.request_ids
        if plan is None or len(engine.in_flight) == depth:
            engine.commit()
    assert 0 < started <= depth
    engine.drain()


@pytest.mark.parametrize(
    ("second", "options"),
    [
        ({"cache_salt": "another"}, {}),
        ({}, {"shares_prefixes": False}),
        ({"prompt_logprobs": 0}, {}),
        ({"prompt_token_ids": (99, *PROMPT[1:])}, {}),
        ({"prompt_token_ids": PROMPT[:PAGE]}, {}),
        ({}, {"copy_costs": CopyCosts(page_s=0.0, token_s=1e-6, wait_s=1.0)}),
    ],
    ids=["salt", "sharing off", "scores of the prompt", "another prompt", "one page", "steps are long"],
)
def test_a_request_that_has_nothing_to_wait_for_does_not_wait(second: dict, options: dict) -> None:
    engine = Engine(max_step_tokens=500, **options).add(request("a"), replace(request("b"), **second))
    plan = engine.plan()
    assert plan is not None
    assert plan.request_ids == ("a", "b")
    assert plan.starts.tolist() == [0, 0]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_what_was_computed_of_an_aborted_prompt_is_found(depth: int) -> None:
    engine = Engine(depth=depth).add(request("a"))
    for _ in range(2):
        engine.step()
    engine.scheduler.abort("a")
    engine.add(request("b")).drain()
    assert engine.computed["a"] == 24
    assert engine.prompt_tokens("b") == len(PROMPT) - 24


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_prompt_that_is_preempted_is_not_computed_again(depth: int) -> None:
    engine = Engine(depth=depth).add(request("a"))
    for _ in range(2):
        engine.step()
    engine.scheduler._preempt(engine.scheduler._live["a"])
    engine.drain()
    assert engine.scheduler.stats().preemptions == 1
    assert engine.prompt_tokens("a") == len(PROMPT)


def test_a_prompt_whose_scores_are_there_in_part_is_computed_from_where_they_end() -> None:
    """The scores of what was computed are known once that step is committed."""
    scheduler = Engine().add(request("a", prompt_logprobs=0)).scheduler
    sequence = scheduler._live["a"]
    sequence.num_scored = 22
    assert sequence.num_reusable == 22
    sequence.num_scored = len(PROMPT) - 1
    assert sequence.num_reusable == len(PROMPT)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_pages_of_a_prompt_that_is_not_finite_are_found_by_nobody(depth: int) -> None:
    engine = Engine(depth=depth).add(request("a", PROMPT[:16])).drain()
    engine.broken = {"b"}
    engine.add(request("b")).drain()
    assert engine.outputs[-1] == RequestOutput("b", None, FinishReason.ERROR)
    engine.add(request("c"), request("d")).drain()
    assert engine.cached("c") == 16  # those of "a", behind which a token was sampled
    assert engine.cached("d") == len(PROMPT) - PAGE


def test_a_prompt_on_pages_that_are_dropped_goes_on_and_nobody_finds_what_it_computes() -> None:
    """Its own logits tell whether it is right; until then it may not stand behind another's equal pages."""
    engine = Engine(depth=2, max_step_tokens=30).add(request("a"))
    engine.plan()
    engine.scheduler.abort("a")
    engine.commit()  # 28 tokens are there, and nobody has sampled behind them
    engine.broken = {"b"}
    engine.add(request("b", PROMPT[:33])).plan()
    long = (*PROMPT[:28], *range(60, 90))
    engine.add(request("e", PROMPT[:28], prompt_logprobs=0), request("c", long)).plan()
    assert engine.computed == {"a": 30, "b": 6, "e": 28, "c": 1}
    engine.commit()
    assert engine.outputs[-1] == RequestOutput("b", None, FinishReason.ERROR)
    engine.commit()  # "e" has computed them anew
    engine.plan()
    engine.commit()
    assert engine.computed["c"] > 2 * PAGE
    engine.scheduler.abort("c")
    engine.add(request("d", long)).drain()
    assert engine.cached("d") == 28


def test_a_prompt_does_not_start_if_those_that_run_will_take_its_pages_before_it_is_computed() -> None:
    """Or it would be preempted, wait until they end, and have lost its pages by then."""
    engine = Engine(num_pages=40, max_step_tokens=6, depth=1)
    for index in range(4):
        engine.add(request(f"d{index}", (90 + index,) * 4, max_tokens=31))
    for _ in range(4):
        engine.step()
    engine.add(request("long", max_tokens=1)).drain()
    assert engine.scheduler.stats().preemptions == 0
    assert engine.prompt_tokens("long") == len(PROMPT)


def test_pages_that_are_copied_from_the_host_leave_room_for_a_prompt_that_runs() -> None:
    """A prompt of which all but one token is on the host waits beside one that is computed in chunks."""
    limits = EngineLimits(max_model_len=48, vocab_size=100, num_pages=12, page_size=4, num_host_pages=40)
    scheduler = Scheduler(SchedulerConfig(max_rows=4, max_step_tokens=4), limits)

    def add(request_id: str, first: int, length: int) -> None:
        prompt = np.arange(first, first + length, dtype=np.int32) % 100
        scheduler.add(Request(request_id=request_id, prompt_token_ids=prompt, max_tokens=1))

    def steps(most: int) -> None:
        for _ in range(most):
            if not scheduler.has_work:
                return
            plan = scheduler.plan()
            assert plan is not None, "nothing runs, and two requests have not ended"
            scheduler.commit(plan, SampledTokens(ids=np.full(plan.num_rows, 7, np.int32), finished_s=0.0))
            scheduler.check_invariants()

    add("first", 0, 33)
    steps(20)
    add("evicts", 40, 47)
    steps(20)
    add("in chunks", 90, 43)
    steps(1)
    add("first again", 0, 33)
    steps(40)
    assert not scheduler.has_work
    assert scheduler.stats().tiers.copied_in == 8


@pytest.mark.parametrize("salt", ["", "own"])
@pytest.mark.parametrize("length", [3, 4, 39, 40])
def test_digests_that_come_with_a_request_are_those_that_the_scheduler_makes(salt: str, length: int) -> None:
    """So that the prompt of one that brings them is found by one that does not, and the other way round."""
    prompt = PROMPT[:length]
    packed = packed_digests(np.array(prompt, np.int32), salt=salt, page_size=PAGE)
    bare = request("bare", prompt, cache_salt=salt)
    engine = Engine().add(bare).drain().add(replace(bare, request_id="b", page_digests=packed)).drain()
    assert engine.cached("b") == (length - 1) // PAGE * PAGE
    scheduler = Engine().add(replace(bare, page_digests=packed)).scheduler
    sequence = scheduler._live["bare"]
    brought = list(sequence.full_pages(sequence.known_ids, page_size=PAGE))
    sequence.request, sequence.digests = bare, []
    assert brought == sequence.full_pages(sequence.known_ids, page_size=PAGE)


def test_digests_of_before_all_prefixes_were_lost_or_for_another_page_size_are_not_taken() -> None:
    for size, forget in ((PAGE, True), (2 * PAGE, False)):
        packed = packed_digests(np.array(PROMPT, np.int32), salt="", page_size=size)
        engine = Engine().add(request("a", page_digests=packed)).drain()
        if forget:
            engine.scheduler.forget_prefixes()
        engine.add(request("b", page_digests=packed), request("c")).drain()
        assert engine.cached("b") == (0 if forget else len(PROMPT) - PAGE)
        assert engine.cached("c") == len(PROMPT) - PAGE
