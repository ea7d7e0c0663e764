"""The prefix cache of requests: a request's tokens found in pages, and its own pages that others may find.

A page can be found once the step that filled it is committed; a step that was dropped fills none. The chunks
of a prompt before its last one sample nothing, so that nobody has seen yet whether their keys and values are
finite. Such pages are *unproven* until a token is sampled from finite logits behind them. If the logits
behind a prompt are not finite, the first unproven page of its prefix leaves the tree, with all behind it::

    prompt of 5 pages, 2 in the tree    tree before    committed: chunk 1    chunk 2, finite    or not finite
      p proven, u unproven                p p            p p u u               p p p p p          p p

A waiting request does not start while a step in flight computes a page that it would compute again: see
`is_awaited`. The last of the tokens that are known is always computed, since its logits are needed.
"""

import itertools
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import NOT_FINITE, NULL_PAGE, Bools, CopyCosts, Int32s, StepPlan
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.sched.kv_pages import KvPages
from albireo_jax.sched.policy import is_worth_copying, is_worth_waiting
from albireo_jax.sched.prefix_tree import Digest, Node, page_digests, root_digest, shared_root
from albireo_jax.sched.sequence import Sequence, SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Prompt tokens of requests that started, and how many of them pages held already, since the start.

    Preempted requests that come back are not counted again.
    """

    prompt_tokens: int
    cached_tokens: int


class SuspectPage(NamedTuple):
    """The first unproven page of a prompt that turned out not finite, and its place in the prefix."""

    node: Node
    place: int


class _Chunk(NamedTuple):
    """Known tokens up to `end` that a planned step computes, and the pages that they fill from `place` on."""

    sequence: Sequence
    end: int
    place: int
    nodes: list[Node]
    unproven: list[Node]


class PrefixCache:
    """Finds and registers prefixes in `tiers`; `shares` false keeps every request to its own pages."""

    def __init__(self, tiers: KvPages, *, page_size: int, shares: bool, costs: CopyCosts | None) -> None:
        self._tiers = tiers
        self._page_size = page_size
        self._shares = shares
        self._costs = costs
        self._unshared = itertools.count()
        self._generation = 0
        self._chunks: dict[int, list[_Chunk]] = {}  # by step, of the steps in flight
        self._coming: dict[Digest, Node] = {}  # the pages that those steps fill
        self._untold: dict[str, int] = {}  # hits of requests without a token, by request
        self._prompt_tokens = self._cached_tokens = 0

    def stats(self) -> CacheStats:
        """Counts of prompt tokens."""
        return CacheStats(prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def root(self, request: Request) -> Digest:
        """The place where the prefixes of a request begin."""
        if self._shares:
            return shared_root(request.cache_salt, generation=self._generation)
        return root_digest(f"request {next(self._unshared)}")

    def forget(self) -> None:
        """Let requests that are added from now on find no page of earlier ones."""
        self._generation += 1

    def find(self, sequence: Sequence) -> list[Node]:
        """The pages that hold the known tokens of the sequence, as far as they are of use to it.

        Pages that were found before are not looked up again: a page in the tree has all before it there.
        """
        chain = sequence.chain
        while chain and not chain[-1].digest:
            chain.pop()
        digests = self._digests(sequence, sequence.known_ids)
        for digest in itertools.islice(digests, len(chain), self._num_useful(sequence)):
            node = self._tiers.get(digest)
            if node is None:
                break
            chain.append(node)
        on_device = num_on_device(chain)
        missing = len(chain) - on_device
        if missing and not is_worth_copying(missing, missing * self._page_size, costs=self._costs):
            return chain[:on_device]
        return chain

    def is_awaited(self, sequence: Sequence, chain: list[Node]) -> bool:
        """Whether a step in flight computes the page behind `chain`, so that to wait for it is worth more.

        Once all planned steps are committed, nothing is awaited.
        """
        if not self._shares or not self._coming:
            return False
        count = 0
        for digest in itertools.islice(sequence.digests, len(chain), self._num_useful(sequence)):
            node = self._coming.get(digest)
            if node is None or node.page == NULL_PAGE:  # given away since
                break
            count += 1
        return count > 0 and is_worth_waiting(count * self._page_size, costs=self._costs)

    def count_start(self, sequence: Sequence, *, num_pages: int) -> None:
        """Note that a request starts, or comes back, behind `num_pages` that were found."""
        if sequence.cached_tokens is None:
            sequence.cached_tokens = num_pages * self._page_size
            self._prompt_tokens += len(sequence.request.prompt_token_ids)
            self._cached_tokens += sequence.cached_tokens
            if num_pages:
                self._untold[sequence.request.request_id] = sequence.cached_tokens

    def tell_hits(self, outputs: list[RequestOutput]) -> None:
        """Put into the outputs of first tokens how many tokens of their prompts were found."""
        if not self._untold:
            return
        for index, output in enumerate(outputs):
            cached = self._untold.pop(output.request_id, 0)
            if cached and output.token_id is not None:
                outputs[index] = output._replace(cached_tokens=cached)

    def drop(self, request_id: str) -> None:
        """Forget the hits of a request that was aborted."""
        self._untold.pop(request_id, None)

    def expect_chunk(self, sequence: Sequence, end: int, *, step: int, table: SlotTable) -> None:
        """Note that `step` computes known tokens of a running request up to `end`.

        The pages that they fill can be found once it is committed.
        """
        slot, full = sequence.slot, end // self._page_size
        place = int(table.registered[slot])
        nodes = [Node(page=page) for page in table.pages[slot, place:full].tolist()]
        table.registered[slot] = max(place, full)
        self._chunks.setdefault(step, []).append(_Chunk(sequence, end, place, nodes, sequence.unproven))
        digests = self._digests(sequence, sequence.known_ids)
        for at, node in enumerate(nodes, start=place):
            sequence.pending[at] = node
            self._coming.setdefault(digests[at], node)

    def register_chunks(self, plan: StepPlan, ids: Int32s) -> list[SuspectPage]:
        """Let the pages be found that the chunks of a committed plan filled; gives those to be dropped.

        Whether their requests still run does not matter: pages that they released are *pending* until now.
        """
        suspects: list[SuspectPage] = []
        chunks = self._chunks.pop(plan.step, ())
        for row, chunk in enumerate(chunks, start=plan.num_rows - len(chunks)):
            is_finite = not plan.samples[row] or ids[row] != NOT_FINITE
            self._register_chunk(chunk, is_finite=is_finite)
            if plan.samples[row] and is_finite:
                for node in chunk.unproven:
                    node.is_proven = True
                chunk.unproven.clear()
            elif not is_finite:
                suspects += self._suspect(chunk)
        return suspects

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
            digests = live[table.request_id[slot]].full_pages(token_ids, page_size=self._page_size)
            self._register(digests, nodes)
            table.registered[slot] = end

    def expect_last(self, sequence: Sequence, slot: int, table: SlotTable) -> list[Node]:
        """The last pages of a request that leaves its slot before their step is committed: its `pending`."""
        first, end = int(table.registered[slot]), int(table.computed[slot]) // self._page_size
        if first < end:
            pages = enumerate(table.pages[slot, first:end].tolist(), start=first)
            sequence.pending |= {place: Node(page=page) for place, page in pages}
        if sequence.pending:
            known_ids = table.token_ids[slot, : table.committed[slot]]
            num_full = len(sequence.full_pages(known_ids, page_size=self._page_size))
            sequence.tail_ids = known_ids[num_full * self._page_size :].tolist()
        return list(sequence.pending.values())

    def register_pending(self, sequence: Sequence, token_id: int, *, ended: bool) -> None:
        """Take in a token of a request without a slot; its last pages can be found when it has ended."""
        if sequence.pending and ended:
            tail_ids = np.array(sequence.tail_ids, np.int32)
            parent = sequence.digests[-1] if sequence.digests else sequence.root
            sequence.digests += page_digests(parent, tail_ids, page_size=self._page_size)
            self._register(sequence.digests, sequence.pending)
        elif sequence.pending:
            sequence.tail_ids.append(token_id)

    def _num_useful(self, sequence: Sequence) -> int:
        """Number of pages of known tokens that need not be computed if they are found."""
        return min(len(sequence.known_ids) - 1, sequence.num_reusable) // self._page_size

    def _digests(self, sequence: Sequence, token_ids: Int32s) -> list[Digest]:
        return sequence.full_pages(token_ids, page_size=self._page_size)

    def _register(self, digests: list[Digest], nodes: dict[int, Node]) -> None:
        """Let pages of a sequence be found: `nodes` by place, as far as there are `digests` of full pages.

        Finite logits were seen behind them.
        """
        for place, node in nodes.items():
            if place < len(digests):
                node.is_proven = True
                self._tiers.insert(node, digests[place], parent=digests[place - 1] if place else None)

    def _register_chunk(self, chunk: _Chunk, *, is_finite: bool) -> None:
        """Let the pages that a chunk filled be found if they may be; they are no longer on their way."""
        digests, pending = chunk.sequence.digests, chunk.sequence.pending
        for place, node in enumerate(chunk.nodes, start=chunk.place):
            digest = digests[place]
            if self._coming.get(digest) is node:
                del self._coming[digest]
            if pending.get(place) is node:
                del pending[place]
            found = is_finite and self._tiers.insert(
                node, digest, parent=digests[place - 1] if place else None
            )
            if found:
                chunk.unproven.append(found)

    def _suspect(self, chunk: _Chunk) -> list[SuspectPage]:
        """The first unproven page in the prefix that ends with a chunk, if there is any."""
        for place, digest in enumerate(chunk.sequence.digests[: chunk.end // self._page_size]):
            node = self._tiers.get(digest)
            if node is None:
                return []
            if not node.is_proven:
                return [SuspectPage(node, place)]
        return []


def num_on_device(chain: list[Node]) -> int:
    """Number of a chain's pages on the device: the first ones, since pages leave it from the end."""
    return bisect_left(chain, True, key=lambda node: node.page == NULL_PAGE)
