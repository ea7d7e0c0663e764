"""Steps whose rows stand in the first slots and all sample, with nothing that moves between pages."""

from collections.abc import Sequence

import numpy as np

from albireo_jax.core.plan import Int32s, SlotParams, StepPlan


def plain_plan(
    starts: Sequence[int],
    counts: Sequence[int],
    *,
    token_ids: Int32s | int = 0,
    step: int = 0,
    new_slots: tuple[SlotParams, ...] = (),
) -> StepPlan:
    """Rows that compute `counts` tokens each behind `starts` cached ones, of these ids or all of one id."""
    rows, none = len(starts), np.zeros(0, np.int32)
    return StepPlan(
        step=step,
        request_ids=tuple(map(str, range(rows))),
        epochs=np.zeros(rows, np.int32),
        slots=np.arange(rows, dtype=np.int32),
        starts=np.array(starts, np.int32),
        counts=np.array(counts, np.int32),
        samples=np.ones(rows, np.bool_),
        token_ids=np.broadcast_to(np.asarray(token_ids, np.int32), (sum(counts),)).copy(),
        update_slots=none,
        update_columns=none,
        update_pages=none,
        new_slots=new_slots,
    )
