"""One live request, and the table of the requests that hold a slot.

A request that waits is only a `Sequence`. One that runs also has a row in the `SlotTable`, which
keeps what every step reads or changes as one array per field, so that a step of 512 rows costs a
few array operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from albireo_jax.core.logit_rules import NO_RULES
from albireo_jax.core.plan import NOT_FINITE, Bools, Int32s, LogprobArrays, SlotParams, SlotRules
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.constraints import ConstrainedAnswer
from albireo_jax.sched.prefix_tree import Digest, Node, extend_digests, unpacked_digests

NOT_ADMITTED = 0
"""Epoch of a sequence, and of a slot, that is in no admission; those are numbered from 1."""

Place = tuple[float, ...]
"""Where a request stands in the order of a policy; the lowest place starts first."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request and its admission.

    `known_ids` are the prompt and the part of the answer that was committed before the request last
    waited. `place` orders it among all live requests, for life. `epoch` numbers the admission whose results
    are awaited. `slot` is None while the request waits, and again once its last step is planned and only
    results are outstanding. `answer` is there if the request has a constraint, which has taken in the tokens
    that were committed. `num_scored` tokens of the prompt, those from the second on, have had their scores
    committed; `prompt_scores` are to go out yet.
    `root` and `digests` are those of its full pages; `chain` are the pages found when it was last looked up.
    While its pages are copied to the device, by a step numbered `restored_by`, the request waits and owns
    those that are `held`. `pending` are pages, by their place in the prefix, that steps in flight fill; they
    may be without an owner by then, if the request ends or is preempted. Once the last step is planned,
    `tail_ids` are the tokens behind its pages with a digest. `unproven` are the pages of its prefix, in this
    admission, behind which no token was sampled yet. `cached_tokens` of the prompt were found in pages when
    it first started.
    """

    request: Request
    known_ids: Int32s
    place: Place = ()
    epoch: int = NOT_ADMITTED
    slot: int | None = None
    answer: ConstrainedAnswer | None = None
    num_scored: int = 0
    prompt_scores: tuple[LogprobArrays, ...] = ()
    root: Digest = b""
    digests: list[Digest] = field(default_factory=list["bytes"])
    chain: list[Node] = field(default_factory=list["Node"])
    held: list[Node] = field(default_factory=list["Node"])
    restored_by: int | None = None
    pending: dict[int, Node] = field(default_factory=dict["int", "Node"])
    unproven: list[Node] = field(default_factory=list["Node"])
    tail_ids: list[int] = field(default_factory=list["int"])
    cached_tokens: int | None = None

    def full_pages(self, token_ids: Int32s, *, page_size: int) -> list[Digest]:
        """The digests of all full pages that are known, those of the request's first tokens among them."""
        if not self.digests and self.request.page_digests:
            num_pages = len(self.request.prompt_token_ids) // page_size
            self.digests += unpacked_digests(self.request.page_digests, self.root, num_pages=num_pages)
        extend_digests(self.digests, self.root, token_ids, page_size=page_size)
        return self.digests

    @property
    def num_reusable(self) -> int:
        """Number of its first tokens that need not be computed if pages hold them: their scores are there."""
        is_scored = self.num_scored == len(self.request.prompt_token_ids) - 1
        return len(self.known_ids) if self.request.prompt_logprobs is None or is_scored else self.num_scored

    @property
    def wants_scores(self) -> bool:
        """Whether the request asked for log probabilities; those of its prompt go out with a scored token."""
        return self.request.logprobs is not None or self.request.prompt_logprobs is not None

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer at which the request ends."""
        return len(self.request.prompt_token_ids) + self.request.max_tokens

    @property
    def repeats(self) -> bool:
        """Whether the device can sample one token after another without the host, up to a stop."""
        request = self.request
        return request.rules is None and self.answer is None and not self.wants_scores

    def give_prompt_scores(self) -> tuple[LogprobArrays, ...]:
        """Hand out the `prompt_scores`, once."""
        scores, self.prompt_scores = self.prompt_scores, ()
        return scores

    def take(self, token_id: int, *, length: int) -> FinishReason | None:
        """The reason if the request ends with `token_id`, which makes it `length` tokens long.

        If it does not, its constraint must still make the mask behind that token, and may end it.
        """
        if self.answer is not None:
            self.answer.check(token_id)
        if token_id in self.request.stop_ids:
            return FinishReason.STOP
        if length == self.limit:
            return FinishReason.LENGTH
        if self.answer is not None:
            self.answer.take(token_id, position=length)
        return None

    def output(self, token_id: int, reason: FinishReason | None) -> RequestOutput:
        """The output of a step that samples `token_id`; without a token if the logits were not finite."""
        is_text = reason is None or token_id not in self.request.stop_ids
        token = None if token_id == NOT_FINITE else token_id
        return RequestOutput(self.request.request_id, token, reason, is_text=is_text)

    def slot_params(self, slot: int, pages: tuple[int, ...]) -> SlotParams:
        """The device's parameters to go on with this request in `slot`, behind the tokens in `pages`."""
        request = self.request
        return SlotParams(
            slot=slot,
            sampling=request.sampling,
            banned_until=len(request.prompt_token_ids) + request.min_tokens,
            stop_ids=request.stop_ids,
            rules=self._rules(),
            pages=pages,
        )

    def _rules(self) -> SlotRules | None:
        request = self.request
        if request.rules is None and self.answer is None:
            return None
        return SlotRules(
            rules=request.rules or NO_RULES,
            token_ids=self.known_ids,
            prompt_len=len(request.prompt_token_ids),
        )


place_of: Callable[[Sequence], Place] = attrgetter("place")
"""The place of a sequence, to sort by."""


class NewPages(NamedTuple):
    """Entries of the page table that a step adds."""

    slots: Int32s
    columns: Int32s
    pages: Int32s


def join_pages(parts: list[NewPages]) -> NewPages:
    """The entries of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    return NewPages(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class SlotTable:
    """The scheduler's state of the request in each slot, one array per field, indexed by slot.

    computed: tokens whose computing is planned. length: tokens known or sampled by a planned step.
    known: tokens that the host knew at admission; later ones are read on the device. committed: tokens
    that the host knows now, token_ids[slot, :committed]. limit: length at which the request ends.
    num_pages: pages held, pages[slot, :num_pages] in the order of the tokens in them. epoch: the admission,
    or NOT_ADMITTED. registered: pages, the first ones, that are in the tree of prefixes, or will be once the
    step that fills them is committed, or are not wanted there.
    constrained: whether the request has a constraint. awaits_mask: whether the mask of its next token is not
    made yet. scored: whether it wants scores. repeats: whether it may take several steps by itself.
    """

    def __init__(self, max_rows: int, *, max_len: int, page_size: int) -> None:
        self.computed = np.zeros(max_rows, np.int32)
        self.length = np.zeros(max_rows, np.int32)
        self.known = np.zeros(max_rows, np.int32)
        self.committed = np.zeros(max_rows, np.int32)
        self.limit = np.zeros(max_rows, np.int32)
        self.epoch = np.full(max_rows, NOT_ADMITTED, np.int32)
        self.constrained = np.zeros(max_rows, np.bool_)
        self.awaits_mask = np.zeros(max_rows, np.bool_)
        self.scored = np.zeros(max_rows, np.bool_)
        self.repeats = np.zeros(max_rows, np.bool_)
        self.num_pages = np.zeros(max_rows, np.int32)
        self.registered = np.zeros(max_rows, np.int32)
        self.pages = np.zeros((max_rows, -(-max_len // page_size)), np.int32)
        self.token_ids = np.zeros((max_rows, max_len), np.int32)  # takes memory where it is used
        self.request_id = np.full(max_rows, "", object)
        self.page_size = page_size

    def fill(self, slot: int, sequence: Sequence, pages: tuple[int, ...]) -> None:
        """Enter `sequence` at its epoch; only the tokens in `pages` are computed."""
        known = len(sequence.known_ids)
        self.num_pages[slot] = self.registered[slot] = len(pages)
        self.pages[slot, : len(pages)] = pages
        self.computed[slot] = len(pages) * self.page_size
        self.length[slot] = self.known[slot] = self.committed[slot] = known
        self.limit[slot] = sequence.limit
        self.epoch[slot] = sequence.epoch
        self.constrained[slot] = sequence.answer is not None
        self.awaits_mask[slot] = False
        self.scored[slot] = sequence.wants_scores
        self.repeats[slot] = sequence.repeats
        self.token_ids[slot, :known] = sequence.known_ids
        self.request_id[slot] = sequence.request.request_id

    def num_decoding(self, running: Int32s) -> int:
        """How many of `running`, oldest first, have all known tokens computed: all but perhaps the last."""
        if len(running) and self.computed[running[-1]] < self.known[running[-1]]:
            return len(running) - 1
        return len(running)

    def are_held(self, slots: Int32s) -> Bools:
        """Whether each of `slots` waits for its token or for the mask behind it."""
        is_unknown = self.committed[slots] < self.length[slots]
        return self.constrained[slots] & (is_unknown | self.awaits_mask[slots])

    def give(self, slots: Int32s, columns: Int32s, pages: Int32s) -> NewPages:
        """Put `pages` at `columns` of the page tables of `slots`, ascending where a slot repeats."""
        self.pages[slots, columns] = pages
        self.num_pages[slots] = columns + 1
        return NewPages(slots, columns, pages)

    def growth(self, running: Int32s, *, num_steps: int) -> int:
        """Pages beside their own that the slots in `running` fill within `num_steps` of a token each.

        Those of a prompt that is being computed are filled however few steps there are; the single token of
        each other slot is not counted in one step.
        """
        if num_steps == 1 and self.num_decoding(running) == len(running):
            return 0
        computed = np.maximum(self.computed[running], self.known[running])
        ends = np.minimum(computed + num_steps, self.limit[running] - 1)
        return int(np.maximum(-(-ends // self.page_size) - self.num_pages[running], 0).sum())

    def keep_unfound(self, running: Int32s, *, page: int, place: int) -> None:
        """Register no more pages of the slots in `running` that hold `page` at `place`."""
        holders = running[(self.num_pages[running] > place) & (self.pages[running, place] == page)]
        self.registered[holders] = self.pages.shape[1]

    def clear(self, slots: Int32s) -> Int32s:
        """Empty `slots`; gives the pages that they held, slot by slot."""
        held = self.num_pages[slots]
        pages = self.pages[slots, : held.max()]
        self.epoch[slots] = NOT_ADMITTED
        self.num_pages[slots] = 0
        return pages[np.arange(pages.shape[1]) < held[:, None]]

    def check_invariants(self, running: Int32s, free_slots: list[int], live: Mapping[str, Sequence]) -> None:
        """Raise AssertionError if slots are lost, or the fields of those in `running` contradict."""
        slots = sorted([*running.tolist(), *free_slots])
        assert slots == list(range(len(self.epoch))), f"slots lost or doubled: {slots}"
        for slot, request_id in zip(running.tolist(), self.request_id[running].tolist(), strict=True):
            sequence = live[request_id]
            assert (sequence.slot, sequence.epoch) == (slot, self.epoch[slot]), f"slot {slot} is another's"
            pending = sequence.answer is not None and sequence.answer.is_pending
            assert self.awaits_mask[slot] == pending, f"slot {slot} is planned before its mask is made"
        computed, length = self.computed[running], self.length[running]
        exact = -(-computed // self.page_size)
        assert np.array_equal(self.num_pages[running], exact), (
            "pages held are not those of the computed tokens"
        )
        assert (computed < length).all(), "a running request has nothing to compute"
        assert (length < self.limit[running]).all(), "a running request is past its limit"
        assert (computed >= self.known[running])[:-1].all(), (
            "a prompt is computed before that of an older one"
        )
        registered = self.registered[running]
        assert ((registered <= self.num_pages[running]) | (registered == self.pages.shape[1])).all(), (
            "a page is found before it is there"
        )
