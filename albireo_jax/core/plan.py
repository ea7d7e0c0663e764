"""The seam between control plane and data plane: a complete, frozen step plan and its result.

A plan lists R rows (requests) oldest first and T tokens packed row after row. It carries
everything that a step needs beyond the device's own state, and everything that its result
needs to be matched with: request ids and epochs, never a reference to live scheduler state.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.token_sampling import TokenSampling

TOKEN_ON_DEVICE = -1
"""Stands for a token that the device sampled last for the row's slot and the host need not know."""

NOT_FINITE = -1
"""Stands for the token of a row whose logits were not finite."""

NULL_PAGE = 0
"""Page that padding writes to and no request owns; usable pages are 1 … num_pages."""

Int32s = NDArray[np.int32]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRules:
    """The rules of a request that is admitted to a slot, and the tokens that they start from.

    `token_ids` are the prompt and what is known of the answer, which begins at `prompt_len`.
    """

    rules: LogitRules
    token_ids: Int32s
    prompt_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotParams:
    """Sampling of a slot's tokens; a step writes it into the slot before its row is computed.

    `banned_until` is the first position (tokens before it, prompt included) at which the ids in
    `stop_ids` may be sampled; a position below it never yields one. A slot that gets masks has `rules` too.
    `pages` already hold the request's first tokens: they become the first entries of the slot's page table.
    """

    slot: int
    sampling: TokenSampling
    banned_until: int
    stop_ids: tuple[int, ...]
    rules: SlotRules | None = None
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobTargets:
    """Tokens of a step whose log probabilities are wanted; usually none.

    `rows` are rows of the plan: the token that each samples is scored. `tokens` are indices into the plan's
    `token_ids`: token j is followed by `next_ids[j]`, which is scored.
    """

    rows: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))
    tokens: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))
    next_ids: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def count(self) -> int:
        """Number of tokens that are scored."""
        return len(self.rows) + len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobArrays:
    """Log probabilities of X tokens and of the B likeliest in the place of each, likeliest first.

    They are those of the model: of its logits before any rule, penalty or temperature. `ranks` [X] count
    from 1, the likeliest; `logprobs` is [X]; `top_ids` and `top_logprobs` are [X, B].
    """

    logprobs: Floats
    ranks: Int32s
    top_ids: Int32s
    top_logprobs: Floats

    @property
    def count(self) -> int:
        """X."""
        return len(self.logprobs)

    def part(self, first: int, end: int) -> "LogprobArrays":
        """The scores of tokens `first` … `end` - 1."""
        return LogprobArrays(
            logprobs=self.logprobs[first:end],
            ranks=self.ranks[first:end],
            top_ids=self.top_ids[first:end],
            top_logprobs=self.top_logprobs[first:end],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopies:
    """Pairs of pages to copy between the device and host memory; usually none.

    Host pages are 1 … num_host_pages. `to_host` has pairs (device page, host page): the page is read before
    the step's forward pass, so that the step may write over it. `to_device` has pairs (host page, device
    page): the copy is started with the step, after its copies to the host, and is valid on the device from
    the *next* dispatched step on; this step must neither read nor write the device page. The host page may
    be copied to again, or given up, in the next plan. No page is the target of two pairs.
    """

    to_host: tuple[tuple[int, int], ...] = ()
    to_device: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCosts:
    """Seconds to copy a page from the host, to compute a token of a prompt, and to wait for any copy at all.

    A copy is started with one step and used after it was committed: `wait_s` is about two steps.
    """

    page_s: float
    token_s: float
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: which tokens of which requests to compute, and where their keys and values go.

    Row i computes `counts[i]` tokens at positions `starts[i]`, `starts[i]`+1, …, and samples the next
    one, at position `starts[i] + counts[i]`, if `samples[i]`. `token_ids` holds the rows' tokens one
    after the other; `TOKEN_ON_DEVICE` reads the slot's last sampled token. Before anything is computed the
    step writes `new_slots`, with the pages that they begin with, and then sets
    `page_table[update_slots[j], update_columns[j]] = update_pages[j]`. Row j of `masks`,
    [len(mask_slots), ceil(vocab / 32)], says which tokens the row in `mask_slots[j]` may sample, as in
    `TokenConstraint.mask`; other rows may sample any. A plan without rows only copies pages.

    `steps` are for plans whose rows all decode, one token each that is on the device, and sample: row i then
    goes on by itself, each token that it samples being the next that it computes, until it has sampled
    `steps[i]` or one that is not finite or among the `stop_ids` of its slot. A row whose last token was such
    a one does nothing. Pages for all steps are among the updates. Empty: one step, as above.
    """

    step: int
    request_ids: tuple[str, ...]
    epochs: Int32s
    slots: Int32s
    starts: Int32s
    counts: Int32s
    samples: Bools
    token_ids: Int32s
    update_slots: Int32s
    update_columns: Int32s
    update_pages: Int32s
    new_slots: tuple[SlotParams, ...] = ()
    copies: PageCopies = field(default_factory=PageCopies)
    mask_slots: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))
    masks: Int32s = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    scored: LogprobTargets = field(default_factory=LogprobTargets)
    steps: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def num_rows(self) -> int:
        """Requests in the step."""
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step, or by the first one of several."""
        return len(self.token_ids)

    @property
    def num_steps(self) -> int:
        """Steps that the plan runs at most."""
        return int(self.steps.max()) if len(self.steps) else 1

    def nth_step(self, step: int, rows: Int32s) -> "StepPlan":
        """One of the `steps` as a plan of its own, of some `rows`; only the first one writes and copies."""
        nothing = np.zeros(0, np.int32)
        one = replace(
            self,
            request_ids=tuple(self.request_ids[row] for row in rows.tolist()),
            epochs=self.epochs[rows],
            slots=self.slots[rows],
            starts=self.starts[rows] + np.int32(step),
            counts=self.counts[rows],
            samples=self.samples[rows],
            token_ids=self.token_ids[rows],
            steps=nothing,
        )
        if step == 0:
            return one
        return replace(
            one, update_slots=nothing, update_columns=nothing, update_pages=nothing, copies=PageCopies()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Result of a step: one id per row (meaningless where the plan does not sample).

    Of a plan with `steps`, `ids` has a row for each step, [num_steps, R], and `counts` tells how many tokens
    each of the plan's rows sampled: `ids[:counts[i], i]`.

    An id of `NOT_FINITE` says that the row's logits were not finite, so that nothing could be sampled.

    `finished_s` is when the device ended the step, on the clock of `time.perf_counter` (or the
    simulator's); `sample_s` is the part of the step spent sampling, 0 where it was never measured.
    `copy_s` is what the copies that the plan asked for take by themselves, 0 where that was never measured;
    `copy_wait_s` is the part of the step in which the device computed nothing for copies, its own or those of
    the step before.
    `route` names the way in which its rows were sampled, "" where the executor has no routes; `wire_bytes`
    are what each rank received for it, as far as the host can know.
    `scores` are those of the plan's scored tokens, its rows before its `tokens`; None if there are none.
    """

    ids: Int32s
    finished_s: float
    sample_s: float = 0.0
    copy_s: float = 0.0
    copy_wait_s: float = 0.0
    route: str = ""
    wire_bytes: int = 0
    scores: LogprobArrays | None = None
    counts: Int32s = field(default_factory=lambda: np.zeros(0, np.int32))


class TokenConstraint(Protocol):
    """The tokens that one request may still say, one after another; used by one thread at a time.

    Both methods raise ConstraintError if they cannot go on; that ends the request and no other.
    """

    def mask(self) -> Int32s:
        """Fresh words, [ceil(vocab / 32)]: bit i % 32 of word i // 32 is set if token i may come next.

        None is set if the answer is complete and nothing may follow, not even an end-of-sequence id.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Take in the next token, one that the mask allowed."""
        ...


class StepHandle(Protocol):
    """A dispatched step whose result is on its way."""

    def wait(self) -> SampledTokens:
        """Block until the step's ids are on the host."""
        ...


class Executor(Protocol):
    """Runs plans in the order in which they are dispatched."""

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Queue a step and return at once; the plan must not change afterwards."""
        ...
