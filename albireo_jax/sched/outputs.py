"""The outputs of a committed step: a token for each of its requests that is still there."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress, repeat
from typing import Any, cast

from albireo_jax.core.plan import Bools, SampledTokens, StepPlan
from albireo_jax.core.types import RequestOutput

_make = cast("Callable[[tuple[Any, ...]], RequestOutput]", partial(tuple.__new__, RequestOutput))
"""`RequestOutput._make` without its two calls in Python, since a step makes one output for each row."""

_GOES_ON = RequestOutput("", 0, None)[2:]
"""All fields behind the token, of a request that goes on."""


def step_outputs(
    plan: StepPlan, sampled: SampledTokens, *, kept: Bools, checked: Mapping[int, RequestOutput]
) -> list[RequestOutput]:
    """The outputs of the rows that are `kept`, which go on, and of those that were `checked`, by row."""
    fields = zip(plan.request_ids, sampled.ids.tolist(), *map(repeat, _GOES_ON), strict=False)
    made = list(map(_make, fields))
    if checked:
        kept = kept.copy()
        kept[list(checked)] = True
        for row, output in checked.items():
            made[row] = output
    return made if kept.all() else list(compress(made, kept.tolist()))
