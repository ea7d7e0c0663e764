"""Masks made by threads: nobody waits for a slow one, and answers are the same."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import Request, RequestOutput, SamplingParams, StructuredOutput, StructureKind
from albireo_jax.engine.service import EngineService
from albireo_jax.sched.constraints import ConstrainedAnswer, InlineMaskMaker, MaskMaker
from albireo_jax.text.grammar.mask_threads import ThreadedMaskMaker
from tests.labs.engine_lab import LIMITS, lab, sim_loop
from tests.labs.service_lab import NamedConstraints, bound_by

ALL = np.packbits(np.arange(-(-LIMITS.vocab_size // 32) * 32) < LIMITS.vocab_size, bitorder="little").view(
    np.int32
)
BOUND_S = 30.0


class Gate:
    """A constraint that allows everything, and does `work` before each mask but the first."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.threads: list[str] = []

    def mask(self) -> Int32s:
        if self.threads:
            self.work()
        self.threads.append(threading.current_thread().name)
        return ALL.copy()

    def advance(self, token_id: int) -> None:
        pass


class Hands:
    """A clock that shows what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def begun(gate: Gate) -> ConstrainedAnswer:
    request = Request(request_id="r", prompt_token_ids=(1,), max_tokens=99)
    answer = ConstrainedAnswer(request, gate)
    assert answer.update_mask(1) is None
    answer.take(5, position=2)
    return answer


def again(answer: ConstrainedAnswer) -> None:
    assert answer.settle() is None
    answer.take(5, position=3)


def test_quick_masks_are_there_at_once_and_others_are_not_waited_for() -> None:
    maker, opened = ThreadedMaskMaker(patience_s=0.05), threading.Event()
    slow, quick = begun(Gate(lambda: opened.wait(BOUND_S))), begun(Gate(lambda: None))
    maker.make([slow])
    assert not slow.is_made
    maker.wait([slow], 0.01)
    assert not slow.is_made
    maker.make([quick])
    maker.wait([quick], BOUND_S)
    assert quick.is_made
    opened.set()
    maker.wait([slow], BOUND_S)
    assert slow.is_made


def test_slow_answers_keep_only_each_other_waiting() -> None:
    hands = Hands()
    maker, opened = ThreadedMaskMaker(patience_s=BOUND_S, clock=hands), threading.Event()
    gates = [Gate(lambda: hands.advance(0.1)) for _ in range(6)]
    slow = [begun(gate) for gate in gates]
    quick = begun(Gate(lambda: hands.advance(1e-5)))
    for answer in (*slow, quick):
        maker.make([answer])
        assert answer.is_made
        again(answer)
    for gate in gates:
        gate.work = lambda: opened.wait(BOUND_S)
    begin_s = time.perf_counter()
    maker.make(slow)  # known to be slow by now: they are not waited for
    maker.make([quick])
    assert time.perf_counter() - begin_s < BOUND_S / 2
    assert quick.is_made
    assert not any(answer.is_made for answer in slow)
    opened.set()
    for answer in slow:
        maker.wait([answer], BOUND_S)
    assert all(answer.is_made for answer in slow)


def test_an_answer_that_was_dropped_is_not_worked_on() -> None:
    maker, opened = ThreadedMaskMaker(patience_s=0.0), threading.Event()
    blocking = [begun(Gate(lambda: opened.wait(BOUND_S))) for _ in range(2)]
    gate = Gate(lambda: None)
    dropped, last = begun(gate), begun(Gate(lambda: None))
    maker.make([*blocking, dropped, last])
    dropped.drop()
    opened.set()
    maker.wait([last], BOUND_S)
    assert last.is_made
    assert len(gate.threads) == 1


def test_an_engine_answers_others_while_a_mask_is_made() -> None:
    opened, ended = threading.Event(), threading.Event()
    tokens: dict[str, list[int | None]] = {"bound": [], "free": []}

    def deliver(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            tokens[output.request_id].append(output.token_id)
            if output.request_id == "free" and output.finish_reason is not None:
                ended.set()

    gate = Gate(lambda: opened.wait(BOUND_S))
    service = EngineService(sim_loop(), LIMITS, compiler=NamedConstraints(gate=gate))
    service.start(deliver)
    try:
        bound = Request(
            request_id="bound", prompt_token_ids=(1, 2), max_tokens=9, structured=bound_by("gate")
        )
        service.submit(bound)
        service.submit(Request(request_id="free", prompt_token_ids=(1, 2), max_tokens=50))
        assert ended.wait(BOUND_S)
        assert (len(tokens["free"]), len(tokens["bound"])) == (50, 1)
        opened.set()
        assert service.drain(BOUND_S)
        assert len(tokens["bound"]) == 9
        assert all(name.startswith("albireo-") and name.count("masks") for name in gate.threads[1:])
    finally:
        opened.set()
        service.stop()


SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"], '
    '"additionalProperties": false}'
)
WISHES = (
    StructuredOutput(kind=StructureKind.JSON_SCHEMA, text=SCHEMA),
    StructuredOutput(kind=StructureKind.REGEX, text="[a-f]{3,40}x"),
    StructuredOutput(kind=StructureKind.CHOICE, choices=("yes", "no", "maybe")),
    StructuredOutput(kind=StructureKind.GRAMMAR, text='start: "(" start ")" | "x"'),
)


def answers(maker: MaskMaker) -> list[object]:
    found: list[object] = []
    with lab(mask_maker=maker) as engine:
        for index, wish in enumerate(WISHES):
            for ignore_eos in (False, True):
                params = SamplingParams(
                    max_tokens=30, n=3, seed=index, structured=wish, ignore_eos=ignore_eos, logprobs=1
                )
                found += [
                    (done.text, done.token_ids, done.finish_reason, done.logprobs)
                    for done in engine.frontend.generate(["What?", "Well?"], params)
                ]
        assert engine.service.stats().pages_in_use == 0
    return found


@pytest.mark.parametrize("patience_s", [0.0, 1.0])
def test_answers_are_the_same_whoever_makes_the_masks(patience_s: float) -> None:
    assert answers(ThreadedMaskMaker(patience_s=patience_s)) == answers(InlineMaskMaker())
