"""The masks of a step: which tokens its constrained rows may sample."""

import numpy as np

from albireo_jax.core.plan import Int32s
from albireo_jax.sched.constraints import NO_MASKS, Masks
from albireo_jax.sched.sequence import Sequence, SlotTable


def masks_of(sampling: Int32s, table: SlotTable, live: dict[str, Sequence]) -> Masks:
    """The masks of those of the `sampling` slots that have a constraint."""
    slots = sampling[table.constrained[sampling]]
    answers = [live[request_id].answer for request_id in table.request_id[slots].tolist()]
    words = [answer.mask for answer in answers if answer is not None]
    return Masks(slots, np.stack(words)) if words else NO_MASKS
