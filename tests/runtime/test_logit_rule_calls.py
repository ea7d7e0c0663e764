"""Calls that admit slots with rules: how many a step makes, and that each slot gets its own rules."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.config import SamplingMode, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import SlotRules, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import TP
from albireo_jax.runtime import logit_rule_programs
from albireo_jax.runtime.logit_rule_calls import LogitRuleCalls
from albireo_jax.runtime.logit_rule_programs import (
    RULED_ADMISSIONS,
    AdmissionPacker,
    LogitRulesShape,
    new_rules,
    pack_rules,
)
from albireo_jax.runtime.packed_rules import RulePacker
from albireo_jax.runtime.step import LayerLoop, StepProgram
from albireo_jax.sched.scheduler import Scheduler

SLOTS, VOCAB, MAX_LEN = 32, 105, 64
CALLED = ("admit rules", "apply rules")
EVEN = LogitRules(allowed_token_ids=range(0, VOCAB, 2))
BIASED = LogitRules(logit_bias=((3, 4.0),), bad_words=((5,), (6, 7)), repetition_penalty=2.0)


def _plan(rules: list[LogitRules | None], *, first: int = 0) -> StepPlan:
    """The step in which requests with these rules start together; their prompts begin with `first`, …."""
    limits = EngineLimits(max_model_len=MAX_LEN, vocab_size=VOCAB, num_pages=400, page_size=4)
    scheduler = Scheduler(SchedulerConfig(max_rows=SLOTS, max_step_tokens=128), limits)
    for index, each in enumerate(rules):
        request = Request(
            request_id=f"r{index}", prompt_token_ids=(first + index, 1), max_tokens=4, rules=each
        )
        scheduler.add(request)
    plan = scheduler.plan()
    assert plan is not None
    assert len(plan.new_slots) == len(rules)
    return plan


class RuledSlots(NamedTuple):
    """What packs rules, and the calls that write and apply them."""

    packer: RulePacker
    calls: LogitRuleCalls


class _Counted(dict[Any, Any]):
    """Executables by name, with a count of how often each kind was taken to be called."""

    def __init__(self, compiled: Mapping[Any, Any]) -> None:
        super().__init__(compiled)
        self.calls = Counter[str]()

    def __getitem__(self, name: Any) -> Any:
        """The executable of a program."""
        self.calls[name.kind] += 1
        return super().__getitem__(name)


@pytest.fixture(scope="module", params=[1, 4])
def ruled(
    request: pytest.FixtureRequest, shape: ModelConfig, decoder: Callable[[int], Decoder]
) -> tuple[Callable[[], tuple[RuledSlots, _Counted]], int]:
    """Builds rows without rules yet and their executables; and the padded vocabulary."""
    mesh = decoder(request.param).mesh
    program = StepProgram(
        model=shape,
        mesh=mesh,
        axis=TP,
        page_size=4,
        sampling=SamplingMode.SHARDED,
        layers=LayerLoop.SCANNED,
    )
    padded = shape.padded_vocab_size(request.param)
    sizes = LogitRulesShape(num_slots=SLOTS + 1, padded_vocab=padded, max_len=MAX_LEN)

    def fresh() -> LogitRuleCalls:
        return LogitRuleCalls(program, new_rules(sizes, mesh, axis=TP), max_len=MAX_LEN)

    lowered = {name: lower() for name, lower in fresh().programs((SLOTS,)).items()}
    compiled = {name: each.compile() for name, each in lowered.items() if name.kind in CALLED}

    def build() -> tuple[RuledSlots, _Counted]:
        calls, counted = fresh(), _Counted(compiled)
        calls.use(counted)
        return RuledSlots(RulePacker(sizes), calls), counted

    return build, padded


@pytest.mark.parametrize(
    ("rules", "calls"),
    [
        ([None] * 5, 0),
        ([EVEN], 1),
        ([EVEN] * RULED_ADMISSIONS, 1),
        ([EVEN] * SLOTS, SLOTS // RULED_ADMISSIONS),
        ([None, EVEN, BIASED] * 10, 3),
        ([BIASED, EVEN, LogitRules(allowed_token_ids=[4, 9]), None] * 3, 2),
    ],
)
def test_one_call_admits_several_slots_and_each_has_its_own_rules(
    ruled: tuple[Callable[[], tuple[RuledSlots, _Counted]], int],
    rules: list[LogitRules | None],
    calls: int,
) -> None:
    build, padded = ruled
    rows, counted = build()
    plan = _plan(rules)
    packed = rows.packer.pack(plan, rows=SLOTS)
    rows.calls.write(packed)
    assert counted.calls["admit rules"] == calls
    logits_RV = np.ones((SLOTS, padded), np.float32)
    changed_RV = np.asarray(rows.calls.apply(packed, jnp.asarray(logits_RV)))
    alone, _ = build()
    for row, each in enumerate(rules):  # one after the other in the same slot
        packed = alone.packer.pack(_plan([each], first=row), rows=SLOTS)
        alone.calls.write(packed)
        expected_RV = np.asarray(alone.calls.apply(packed, jnp.asarray(logits_RV)))
        np.testing.assert_array_equal(changed_RV[row, :VOCAB], expected_RV[0, :VOCAB])


def test_rules_that_samples_share_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LogitRulesShape(num_slots=9, padded_vocab=VOCAB, max_len=MAX_LEN)
    packed: list[LogitRules] = []
    pack = logit_rule_programs.packed_content

    def counting(rules: LogitRules, shape: LogitRulesShape) -> Any:
        packed.append(rules)
        return pack(rules, shape)

    monkeypatch.setattr(logit_rule_programs, "packed_content", counting)
    packer = AdmissionPacker(shape)
    tokens = np.array([5, 6, 7], np.int32)
    given = [SlotRules(rules=rules, token_ids=tokens, prompt_len=2) for rules in [EVEN] * 6 + [BIASED] * 2]
    first = packer.pack(list(enumerate(given)))
    packer.pack([(3, given[-1])])
    assert packed == [EVEN, BIASED]
    for slot, each in enumerate(given):
        np.testing.assert_array_equal(first[slot], pack_rules(slot, each, shape))
