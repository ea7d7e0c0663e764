"""Policies of order, preemption and measured costs, and that the scheduler follows them."""

from collections import Counter

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig, SchedulingPolicy
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import CopyCosts, SampledTokens
from albireo_jax.core.types import Request
from albireo_jax.sched.policy import Policy, is_worth_copying, last_in_order, most_copied, most_started
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.sequence import Place

FAST_BUS = CopyCosts(page_s=1e-4, token_s=1e-4, wait_s=1e-3)
SLOW_BUS = CopyCosts(page_s=1e-2, token_s=1e-4, wait_s=1e-3)


@pytest.mark.parametrize(
    ("pages", "costs", "expected"),
    [
        (4, FAST_BUS, True),  # 1.4 ms against 1.6
        (3, FAST_BUS, False),  # 1.3 against 1.2: the wait does not pay
        (100, SLOW_BUS, False),
        (1, None, True),
    ],
)
def test_pages_are_copied_where_that_is_faster(pages: int, costs: CopyCosts | None, expected: bool) -> None:
    assert is_worth_copying(pages, 4 * pages, costs=costs) is expected


def test_a_step_copies_what_it_has_time_for() -> None:
    assert most_copied(64, costs=None) == 64
    assert most_copied(64, costs=FAST_BUS) == 5
    assert most_copied(3, costs=FAST_BUS) == 3
    assert most_copied(64, costs=SLOW_BUS) == 1


@pytest.mark.parametrize(
    ("costs", "copied_in", "computed_again"),
    [
        (None, 7, 1),
        (FAST_BUS, 5, 9),  # five pages at once; then two are left, which are faster to compute
        (SLOW_BUS, 0, 29),
    ],
)
def test_what_is_on_the_host_comes_back_or_is_computed_again(
    costs: CopyCosts | None, copied_in: int, computed_again: int
) -> None:
    """A prompt of 33 tokens, asked for again after another one evicted seven of its eight full pages."""
    limits = EngineLimits(max_model_len=64, vocab_size=100, num_pages=10, page_size=4, num_host_pages=20)
    engine = Scheduler(SchedulerConfig(max_rows=2, max_step_tokens=64), limits, copy_costs=costs)
    computed: list[int] = []
    for name, first in (("a", 0), ("b", 1), ("again", 0)):
        engine.add(Request(request_id=name, prompt_token_ids=(first, *range(32)), max_tokens=1))
        computed.append(0)
        for _ in range(20):
            plan = engine.plan()
            if plan is None:
                break
            computed[-1] += plan.num_tokens
            engine.commit(plan, SampledTokens(ids=np.zeros(plan.num_rows, np.int32), finished_s=0.0))
            engine.check_invariants()
        assert not engine.has_work
    assert computed == [33, 33, computed_again]
    assert engine.stats().tiers.copied_in == copied_in


def test_starts_double_the_decoding_rows_or_make_them_eight() -> None:
    assert most_started(0) is None
    assert [most_started(rows) for rows in (1, 2, 4, 7, 8, 9, 64)] == [7, 6, 4, 7, 8, 9, 64]


@pytest.mark.parametrize("max_tokens", [1, 40])
def test_a_burst_starts_in_its_order_and_a_few_at_a_time_beside_rows_that_decode(max_tokens: int) -> None:
    limits = EngineLimits(max_model_len=64, vocab_size=100, num_pages=600, page_size=4)
    engine = Scheduler(SchedulerConfig(max_rows=64, max_step_tokens=256), limits)

    def step() -> tuple[int, list[str]]:
        """The rows that decode in the next step, and the requests that start in it."""
        plan = engine.plan()
        assert plan is not None
        engine.commit(plan, SampledTokens(ids=np.zeros(plan.num_rows, np.int32), finished_s=0.0))
        engine.check_invariants()
        num_decoding = plan.num_rows - len(plan.new_slots)
        return num_decoding, list(plan.request_ids[num_decoding:])

    engine.add(Request(request_id="stream", prompt_token_ids=(1,), max_tokens=60))
    assert step() == (0, ["stream"])
    burst = [f"r{index}" for index in range(48)]
    for request_id in burst:
        engine.add(Request(request_id=request_id, prompt_token_ids=(2, 3), max_tokens=max_tokens))
    steps = [step() for _ in range(8)]
    assert [name for _, names in steps for name in names] == burst
    for num_decoding, names in steps:
        most = most_started(num_decoding)
        assert num_decoding
        assert most is not None
        assert len(names) <= most


def test_a_burst_starts_at_once_where_no_row_decodes() -> None:
    limits = EngineLimits(max_model_len=64, vocab_size=100, num_pages=600, page_size=4)
    engine = Scheduler(SchedulerConfig(max_rows=64, max_step_tokens=256), limits)
    for index in range(48):
        engine.add(Request(request_id=f"r{index}", prompt_token_ids=(2, 3), max_tokens=4))
    plan = engine.plan()
    assert plan is not None
    assert len(plan.new_slots) == 48


def scheduler(policy: SchedulingPolicy | Policy, *, num_pages: int = 100, max_rows: int = 1) -> Scheduler:
    limits = EngineLimits(
        max_model_len=64, vocab_size=100, num_pages=num_pages, page_size=4, takes_priority=True
    )
    if isinstance(policy, Policy):
        return Scheduler(SchedulerConfig(max_rows=max_rows), limits, policy=policy)
    return Scheduler(SchedulerConfig(max_rows=max_rows, scheduling_policy=policy), limits)


def request(name: str, priority: int = 0, **fields) -> Request:
    values = {"prompt_token_ids": (1, 2, 3), "max_tokens": 4, **fields}
    return Request(request_id=name, priority=priority, **values)


def starts(engine: Scheduler, *, most: int = 200) -> list[str]:
    """The requests in the order in which they start, until all have ended."""
    started: list[str] = []
    for _ in range(most):
        if not engine.has_work:
            return started
        plan = engine.plan()
        assert plan is not None
        started += plan.request_ids[plan.num_rows - len(plan.new_slots) :]
        engine.commit(plan, SampledTokens(ids=np.zeros(plan.num_rows, np.int32), finished_s=0.0))
        engine.check_invariants()
    raise AssertionError(f"after {most} steps some requests have not ended; started: {started}")


LONGEST_FIRST = Policy(order=lambda request: (-request.max_tokens,), victim=last_in_order)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SchedulingPolicy.FCFS, ["a", "b", "c", "d", "e"]),
        (SchedulingPolicy.PRIORITY, ["b", "d", "a", "e", "c"]),
        (LONGEST_FIRST, ["c", "a", "b", "d", "e"]),
    ],
)
def test_requests_start_in_the_order_of_the_policy_and_of_two_that_are_equal_the_earlier(
    policy: SchedulingPolicy | Policy, expected: list[str]
) -> None:
    engine = scheduler(policy)
    for name, priority in (("a", 0), ("b", -1), ("c", 7), ("d", -1), ("e", 0)):
        engine.add(request(name, priority, max_tokens=9 if name == "c" else 4))
    assert starts(engine) == expected


def test_a_request_that_waits_preempts_none() -> None:
    engine = scheduler(SchedulingPolicy.PRIORITY)
    engine.add(request("running", 5))
    assert engine.plan() is not None
    engine.add(request("urgent", -5))
    assert starts(engine) == ["urgent"]
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SchedulingPolicy.FCFS, ["low", "middle", "high", "high"]),
        (SchedulingPolicy.PRIORITY, ["low", "middle", "high", "low"]),
    ],
)
def test_the_last_in_the_order_is_preempted_when_pages_run_out(
    policy: SchedulingPolicy, expected: list[str]
) -> None:
    """Three requests of 8 pages at their end share 19."""
    engine = scheduler(policy, num_pages=19, max_rows=3)
    started: list[str] = []
    for name, priority in (("low", 2), ("middle", 1), ("high", 0)):
        engine.add(request(name, priority, max_tokens=29))
        plan = engine.plan()
        assert plan is not None
        started += plan.request_ids[plan.num_rows - len(plan.new_slots) :]
        engine.commit(plan, SampledTokens(ids=np.zeros(plan.num_rows, np.int32), finished_s=0.0))
    assert started + starts(engine) == expected
    assert engine.stats().preemptions == 1


def test_a_preempted_request_goes_back_to_its_place() -> None:
    """Behind one that arrived later and has a better priority, before one that has a worse one."""
    engine = scheduler(SchedulingPolicy.PRIORITY, num_pages=17, max_rows=2)
    engine.add(request("first", 0, max_tokens=40))
    engine.add(request("second", 1, max_tokens=40))
    assert engine.plan() is not None
    engine.add(request("worse", 2))
    engine.add(request("better", -1))
    assert starts(engine)[:3] == ["better", "second", "worse"]


def test_a_policy_may_keep_a_count_of_its_own() -> None:
    """Turns between those who ask: the n-th request of each comes before the next one of any."""
    count: Counter[str] = Counter()

    def turn(request: Request) -> Place:
        count[request.cache_salt] += 1
        return (count[request.cache_salt],)

    engine = scheduler(Policy(order=turn, victim=last_in_order))
    for name in ("a1", "a2", "a3", "b1", "b2"):
        engine.add(request(name, cache_salt=name[0]))
    assert starts(engine) == ["a1", "b1", "a2", "b2", "a3"]


def test_a_priority_is_refused_where_the_policy_does_not_look_at_it() -> None:
    limits = EngineLimits(max_model_len=64, vocab_size=100, num_pages=10, page_size=4)
    engine = Scheduler(SchedulerConfig(), limits)
    with pytest.raises(ValueError, match=r"^priority -3 needs .*--scheduling-policy priority"):
        engine.add(request("urgent", -3))
    assert engine.add(request("plain")) is None
    with pytest.raises(ValueError, match="priority must be between"):
        request("much", 2**31)
