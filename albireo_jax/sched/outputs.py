"""The outputs of a committed step: a token for each of its requests that is still there."""

from collections.abc import Mapping
from itertools import compress, repeat

from albireo_jax.core.plan import Bools, SampledTokens, StepPlan
from albireo_jax.core.types import RequestOutput


def step_outputs(
    plan: StepPlan, sampled: SampledTokens, *, kept: Bools, checked: Mapping[int, RequestOutput]
) -> list[RequestOutput]:
    """The outputs of the rows that are `kept`, which go on, and of those that were `checked`, by row."""
    made = list(map(RequestOutput, plan.request_ids, sampled.ids.tolist(), repeat(None)))
    if checked:
        kept = kept.copy()
        kept[list(checked)] = True
        for row, output in checked.items():
            made[row] = output
    return made if kept.all() else list(compress(made, kept.tolist()))
