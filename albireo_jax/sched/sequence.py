"""One live request, and the table of those that hold a slot.

A request that waits is only a `Sequence`. One that runs also has a row in the `SlotTable`, which
keeps what every step reads or changes as one array per field, so that a step of 512 rows costs a
few array operations.
"""

from dataclasses import dataclass, field

import numpy as np

from albireo_jax.core.plan import Int32s, SlotParams
from albireo_jax.core.types import Request

NOT_ADMITTED = 0
"""Epoch of a sequence, and of a slot, that is in no admission; those are numbered from 1."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request: its tokens that the host knows, and its admission.

    `epoch` numbers the admission whose results are awaited. `slot` is None while the request waits,
    and again once its last token is planned: then only its results are outstanding.
    """

    request: Request
    prompt_ids: Int32s
    output_ids: list[int] = field(default_factory=list[int])
    epoch: int = NOT_ADMITTED
    slot: int | None = None

    @property
    def known_len(self) -> int:
        """Tokens that the host knows: the prompt and the committed answer."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer at which the request ends."""
        return len(self.prompt_ids) + self.request.max_tokens

    def known_ids(self) -> Int32s:
        """The prompt and the committed answer."""
        if not self.output_ids:
            return self.prompt_ids
        return np.concatenate((self.prompt_ids, np.array(self.output_ids, np.int32)))

    def slot_params(self, slot: int) -> SlotParams:
        """What the device must know to sample this request in `slot`."""
        request = self.request
        return SlotParams(
            slot=slot,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            seed=request.seed,
            banned_until=len(self.prompt_ids) + request.min_tokens,
            stop_ids=request.stop_ids if request.min_tokens else (),
        )


class SlotTable:
    """What the scheduler knows of the request in each slot, one array per field, indexed by slot.

    computed: tokens whose computing is planned. length: tokens known or sampled by a planned step.
    known: tokens known to the host at admission; the later ones are on the device. limit: length at
    which the request ends. num_pages: pages held; pages[slot, :num_pages] are their numbers, in the
    order of the tokens they hold. epoch: the admission, or NOT_ADMITTED.
    """

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self.computed = np.zeros(max_rows, np.int32)
        self.length = np.zeros(max_rows, np.int32)
        self.known = np.zeros(max_rows, np.int32)
        self.limit = np.zeros(max_rows, np.int32)
        self.epoch = np.full(max_rows, NOT_ADMITTED, np.int32)
        self.num_pages = np.zeros(max_rows, np.int32)
        self.pages = np.zeros((max_rows, max_pages), np.int32)
        self.request_id = np.full(max_rows, "", object)
        self.known_ids: list[Int32s] = [np.zeros(0, np.int32)] * max_rows

    def fill(self, slot: int, sequence: Sequence) -> None:
        """Enter `sequence`, nothing of it computed, at its epoch."""
        known_ids = sequence.known_ids()
        self.computed[slot] = 0
        self.length[slot] = self.known[slot] = len(known_ids)
        self.limit[slot] = sequence.limit
        self.epoch[slot] = sequence.epoch
        self.num_pages[slot] = 0
        self.request_id[slot] = sequence.request.request_id
        self.known_ids[slot] = known_ids

    def clear(self, slots: Int32s) -> Int32s:
        """Empty `slots`; gives the pages that they held."""
        held = self.num_pages[slots]
        pages = self.pages[slots, : held.max()]
        self.epoch[slots] = NOT_ADMITTED
        self.num_pages[slots] = 0
        return pages[np.arange(pages.shape[1]) < held[:, None]]
