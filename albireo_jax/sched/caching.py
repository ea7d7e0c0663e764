"""What of a request's tokens is in pages already, and which of its pages others may find.

A page can be found once it is full, and a token has been sampled from logits behind it that were finite: so
what a step computed is found only after its result was seen, and nothing that was dropped ever is. The last
token of what a request knows is always computed, since its logits are needed.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.plan import NULL_PAGE, Bools, CopyCosts, Int32s, StepPlan
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.sched.policy import is_worth_copying
from albireo_jax.sched.prefix import Digest, Node, root_digest
from albireo_jax.sched.sequence import Sequence, SlotTable
from albireo_jax.sched.tiers import PageTiers


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Prompt tokens of requests that started, and those of them that pages held already, since the start.

    Requests that gave way and come back are not counted again.
    """

    prompt_tokens: int
    cached_tokens: int


class PrefixCache:
    """Finds and registers prefixes in `tiers`; `shares` false keeps every request to its own pages."""

    def __init__(self, tiers: PageTiers, *, page_size: int, shares: bool, costs: CopyCosts | None) -> None:
        self._tiers = tiers
        self._page_size = page_size
        self._shares = shares
        self._costs = costs
        self._unshared = itertools.count()
        self._generation = 0
        self._untold: dict[str, int] = {}  # hits of requests without a token, by request
        self._prompt_tokens = self._cached_tokens = 0

    def stats(self) -> CacheStats:
        """Counts of tokens."""
        return CacheStats(prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def root(self, request: Request) -> Digest:
        """Where the prefixes of a request begin."""
        scope = "shared" if self._shares else f"request {next(self._unshared)}"
        return root_digest(f"{self._generation}/{scope}/{request.cache_salt}")

    def forget(self) -> None:
        """Let requests that are added from now on find no page of earlier ones."""
        self._generation += 1

    def find(self, sequence: Sequence) -> list[Node]:
        """The pages that hold what the sequence knows, as far as they are of use to it."""
        if sequence.needs_whole_prompt:
            return []
        digests = sequence.full_pages(sequence.known_ids, page_size=self._page_size)
        chain = self._tiers.find(digests[: (len(sequence.known_ids) - 1) // self._page_size])
        on_device = next((at for at, node in enumerate(chain) if node.page == NULL_PAGE), len(chain))
        missing = len(chain) - on_device
        if missing and not is_worth_copying(missing, missing * self._page_size, costs=self._costs):
            return chain[:on_device]
        return chain

    def count_start(self, sequence: Sequence, *, num_pages: int) -> None:
        """Note that a request starts, or comes back, behind so many pages that were found."""
        if sequence.cached_tokens is None:
            sequence.cached_tokens = num_pages * self._page_size
            self._prompt_tokens += len(sequence.request.prompt_token_ids)
            self._cached_tokens += sequence.cached_tokens
            if num_pages:
                self._untold[sequence.request.request_id] = sequence.cached_tokens

    def tell_hits(self, outputs: list[RequestOutput]) -> None:
        """Put into first tokens how much of their prompts was found."""
        if not self._untold:
            return
        for index, output in enumerate(outputs):
            cached = self._untold.pop(output.request_id, 0)
            if cached and output.token_id is not None:
                outputs[index] = output._replace(cached_tokens=cached)

    def drop(self, request_id: str) -> None:
        """Tell nothing of a request that was aborted."""
        self._untold.pop(request_id, None)

    def register_running(
        self, plan: StepPlan, sampled_R: Bools, table: SlotTable, *, live: Mapping[str, Sequence]
    ) -> None:
        """Let the pages be found that rows filled up to this step; the `sampled_R` rows have their slots."""
        slots, full = plan.slots[sampled_R], (plan.starts + plan.counts)[sampled_R] // self._page_size
        for at in np.flatnonzero(full > table.registered[slots]).tolist():
            slot, end = int(slots[at]), int(full[at])
            first = int(table.registered[slot])
            pages = table.pages[slot, first:end].tolist()
            nodes = {place: Node(page=page) for place, page in enumerate(pages, start=first)}
            token_ids = table.token_ids[slot, : end * self._page_size]
            self._register(live[str(table.request_id[slot])], token_ids, nodes)
            table.registered[slot] = end

    def register_pending(self, sequence: Sequence, token_id: int, *, ended: bool) -> None:
        """Take in a token of a request without a slot; its last pages can be found when it has ended."""
        if ended:
            self._register(sequence, sequence.known_ids, sequence.pending)
        sequence.known_ids = np.append(sequence.known_ids, np.int32(token_id))

    def _register(self, sequence: Sequence, token_ids: Int32s, nodes: dict[int, Node]) -> None:
        """Let pages of a sequence be found: `nodes` by place, as far as its `token_ids` fill them."""
        digests = sequence.full_pages(token_ids, page_size=self._page_size)
        num_full = len(token_ids) // self._page_size
        for place, node in nodes.items():
            if place < num_full:
                self._tiers.insert(node, digests[place], parent=digests[place - 1] if place else None)
