"""Rows whose masks are made aside, and are there when a maker is told so."""

from collections.abc import Sequence

import numpy as np
import pytest

from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.core.types import FinishReason, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.constraints import ConstrainedAnswer
from tests.labs.constraint_lab import EOS, Script, commit, mask_of, planned, request, scheduler


class Told:
    """A `MaskMaker` that makes masks when it is told to, or when it is waited for a `waits`-th time."""

    def __init__(self, *, waits: int = 0) -> None:
        self.pending: list[ConstrainedAnswer] = []
        self.timeouts: list[float] = []
        self.waits = waits

    def make(self, answers: Sequence[ConstrainedAnswer]) -> None:
        self.pending += answers

    def wait(self, answers: Sequence[ConstrainedAnswer], timeout_s: float) -> None:
        self.timeouts.append(timeout_s)
        if len(self.timeouts) == self.waits:
            self.go_on()

    def go_on(self) -> None:
        for answer in self.pending:
            answer.make()
        self.pending = []


def test_the_steps_of_other_rows_go_on_while_a_mask_is_made() -> None:
    maker = Told()
    engine = scheduler(maker)
    engine.add(*request("bound", Script((5,), (6,), (EOS,))))
    engine.add(*request("free"))
    assert commit(engine, planned(engine), 5, 1) == [("bound", 5, None), ("free", 1, None)]
    for token_id in (2, 3):
        assert engine.take_masks() == []
        plan = planned(engine)
        assert (plan.request_ids, plan.mask_slots.size) == (("free",), 0)
        assert commit(engine, plan, token_id) == [("free", token_id, None)]
    maker.go_on()
    plan = planned(engine)
    assert plan.request_ids == ("free",)  # a mask counts when it is taken
    assert engine.take_masks() == []
    plan = planned(engine)
    assert (plan.request_ids, plan.masks.tolist()) == (("bound", "free"), [mask_of(6).tolist()])
    assert plan.starts.tolist() == [3, 6]


@pytest.mark.parametrize(("last", "reason"), [((), FinishReason.STOP), (None, FinishReason.ERROR)])
def test_an_end_that_is_found_late_is_an_output_without_a_token(last, reason: FinishReason) -> None:
    maker = Told()
    engine = scheduler(maker)
    engine.add(*request("bound", Script((5,), last)))
    assert commit(engine, planned(engine), 5) == [("bound", 5, None)]
    assert engine.plan() is None
    assert engine.has_work
    maker.go_on()
    assert engine.take_masks() == [RequestOutput("bound", None, reason)]
    engine.check_invariants()
    engine.check_idle()


def test_a_mask_of_a_request_that_was_aborted_is_dropped() -> None:
    maker = Told()
    engine = scheduler(maker)
    script = Script((5,), (6,))
    engine.add(*request("bound", script))
    commit(engine, planned(engine), 5)
    assert engine.abort("bound") == RequestOutput("bound", None, FinishReason.ABORT)
    engine.check_idle()
    engine.add(*request("bound", Script((7,), (8,))))  # another one of that name
    maker.go_on()
    assert script.taken == []  # nobody asked any more
    assert engine.take_masks() == []
    plan = planned(engine)
    assert plan.masks.tolist() == [mask_of(7).tolist()]
    commit(engine, plan, 7)
    assert engine.take_masks() == []
    assert engine.plan() is None
    maker.go_on()
    engine.take_masks()
    assert planned(engine).masks.tolist() == [mask_of(8).tolist()]


def test_a_preempted_request_comes_back_with_its_mask_and_not_before() -> None:
    maker = Told()
    engine = scheduler(maker)
    engine.add(*request("bound", Script((5,), (6,), (7,))))
    commit(engine, planned(engine), 5)
    engine._preempt(engine._live["bound"])
    engine.add(*request("behind"))
    engine.check_invariants()
    assert engine.plan() is None  # nobody overtakes it
    maker.go_on()
    assert engine.take_masks() == []
    plan = planned(engine)
    assert plan.request_ids == ("bound", "behind")
    assert plan.masks.tolist() == [mask_of(6).tolist()]
    assert (plan.starts + plan.counts).tolist() == [4, 3]


def test_a_preempted_request_may_end_while_it_waits() -> None:
    maker = Told()
    engine = scheduler(maker)
    engine.add(*request("bound", Script((5,), ())))
    commit(engine, planned(engine), 5)
    engine._preempt(engine._live["bound"])
    maker.go_on()
    assert engine.take_masks() == [RequestOutput("bound", None, FinishReason.STOP)]
    engine.check_invariants()
    engine.check_idle()


def test_who_asks_the_process_to_end_is_heard_on_the_engine_thread() -> None:
    class Exits(Script):
        def advance(self, token_id: int) -> None:
            raise SystemExit(3)

    maker = Told()
    engine = scheduler(maker)
    engine.add(*request("bound", Exits((5,))))
    commit(engine, planned(engine), 5)
    maker.go_on()
    with pytest.raises(SystemExit):
        engine.take_masks()


class _Fives:
    """An executor that samples 5 in each row."""

    def dispatch(self, plan: StepPlan) -> "_Fives":
        self.num_rows = plan.num_rows
        return self

    def wait(self) -> SampledTokens:
        return SampledTokens(ids=np.full(self.num_rows, 5, np.int32), finished_s=0.0)


def test_a_loop_with_nothing_else_to_do_waits_for_a_mask_with_a_bound() -> None:
    maker = Told(waits=3)
    engine = scheduler(maker)
    loop = EngineLoop(engine, _Fives(), depth=1, timeline=Timeline())
    engine.add(*request("bound", Script((5,), ()), stop_ids=()))
    assert [len(loop.step()) for _ in range(3)] == [1, 0, 0]
    assert loop.has_work
    assert loop.step() == [RequestOutput("bound", None, FinishReason.STOP)]
    assert not loop.has_work
    assert all(0 < timeout_s <= 0.05 for timeout_s in maker.timeouts)
    assert loop.step() == []
    assert len(maker.timeouts) == 3  # nobody waits for nothing
