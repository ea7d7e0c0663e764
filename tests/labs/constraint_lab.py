"""Constraints that are scripts, and the scheduler step by step."""

from collections.abc import Sequence

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.errors import ConstraintError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Int32s, SampledTokens, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.sched.constraints import MaskMaker
from albireo_jax.sched.scheduler import Scheduler

EOS = 39


class Script:
    """A constraint that allows what each entry lists, one entry per token, the last for all after it.

    None raises.
    """

    def __init__(self, *steps: Sequence[int] | None) -> None:
        self.steps = list(steps)
        self.taken: list[int] = []

    def mask(self) -> Int32s:
        allowed = self.next()
        if allowed is None:
            raise ConstraintError("too complex")
        return mask_of(*allowed)

    def next(self) -> Sequence[int] | None:
        return self.steps[min(len(self.taken), len(self.steps) - 1)]

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)


def mask_of(*token_ids: int) -> Int32s:
    words = np.zeros(2, np.uint32)
    for token_id in token_ids:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words.view(np.int32)


def scheduler(mask_maker: MaskMaker | None = None, **config: int) -> Scheduler:
    limits = EngineLimits(max_model_len=64, vocab_size=40, num_pages=config.pop("num_pages", 64), page_size=4)
    terms = SchedulerConfig(**{"max_rows": 4, "max_step_tokens": 16} | config)
    return Scheduler(terms, limits, mask_maker=mask_maker)


def request(request_id: str, script: Script | None = None, **fields) -> tuple[Request, Script | None]:
    """What `Scheduler.add` takes."""
    values = {"prompt_token_ids": (1, 2, 3), "max_tokens": 8, "stop_ids": (EOS,)} | fields
    return Request(request_id=request_id, **values), script


def planned(engine: Scheduler) -> StepPlan:
    plan = engine.plan()
    engine.check_invariants()
    assert plan is not None
    return plan


def commit(engine: Scheduler, plan: StepPlan, *ids: int):
    """Request, token and reason of each output."""
    outputs = engine.commit(plan, SampledTokens(ids=np.array(ids, np.int32), finished_s=0.0))
    return [tuple(output[:3]) for output in outputs]
