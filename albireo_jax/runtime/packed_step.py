"""A plan as arrays for compiled programs, packed once before anything of its step is launched.

::

    plan with rows ──────────▶ PackedStep      a forward pass, and the sampling of its rows
    plan with rows, steps ───▶ PackedLoop      several steps of the same rows in one call
    plan without rows ───────▶ PackedCopies    copies of pages alone

All arrays are fresh: the runtime may still read them after a call has returned.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from albireo_jax.core.plan import Int32s, PageCopies, SlotParams, StepPlan
from albireo_jax.runtime.batch import (
    ADMISSIONS,
    Bucket,
    choose_bucket,
    layout,
    pack,
    pack_pages,
    pack_params,
    pack_rows,
)
from albireo_jax.runtime.decode_loop import DecodeLoop, choose_loop, loop_layout, pack_steps
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape
from albireo_jax.runtime.logprob_calls import PackedTargets, pack_targets
from albireo_jax.runtime.packed_rules import PackedRules, RulePacker
from albireo_jax.runtime.sampling_programs import slot_route
from albireo_jax.sampling.routes import Route


class PackedStep(NamedTuple):
    """A step of `num_rows` rows, padded to a bucket and sampled by one route.

    Each of `first_pages` and of `admissions` holds up to ADMISSIONS new slots: the pages that they begin
    with, and their sampling parameters. `inputs` is the buffer of the forward pass, `rows` that of sampling.
    """

    num_rows: int
    bucket: Bucket
    copies: PageCopies
    first_pages: Sequence[Int32s]
    inputs: Int32s
    admissions: Sequence[Int32s]
    rules: PackedRules
    has_banned_rows: bool
    rows: Int32s
    route: Route
    targets: PackedTargets


class PackedLoop(NamedTuple):
    """Several steps of `num_rows` rows in one call of a loop; `inputs` is its buffer."""

    num_rows: int
    loop: DecodeLoop
    copies: PageCopies
    inputs: Int32s


class PackedCopies(NamedTuple):
    """Copies of pages, beside which nothing is computed."""

    copies: PageCopies


Packed: TypeAlias = PackedStep | PackedLoop | PackedCopies


class StepPacker:
    """Packs the plans of an engine, in their order: it remembers what each slot was admitted with.

    `routes` are those that the engine samples by, cheapest first. Padding has the last slot of `rules`.
    """

    def __init__(
        self,
        buckets: tuple[Bucket, ...],
        rules: LogitRulesShape,
        *,
        routes: tuple[Route, ...],
        page_size: int,
        pages_per_slot: int,
        decode_steps: int,
    ) -> None:
        self._buckets = buckets
        self._rules = RulePacker(rules)
        self._routes = routes
        self._page_size = page_size
        self._pages_per_slot = pages_per_slot
        self._decode_steps = decode_steps
        self._padding_slot = rules.num_slots - 1
        self._route_Z = np.zeros(rules.num_slots, np.int32)
        self._banned_until_Z = np.zeros(rules.num_slots, np.int32)

    def pack(self, plan: StepPlan) -> Packed:
        """All that a plan's step needs; raises ValueError for a plan that fits none of the buckets."""
        if not plan.num_rows:
            return PackedCopies(copies=plan.copies)
        bucket = choose_bucket(plan, self._buckets)
        self._note(plan.new_slots)
        if len(plan.steps):
            return self._loop(plan, bucket)
        return PackedStep(
            num_rows=plan.num_rows,
            bucket=bucket,
            copies=plan.copies,
            first_pages=self._first_pages(plan.new_slots),
            inputs=pack(plan, layout(bucket, self._page_size), padding_slot=self._padding_slot),
            admissions=self._admissions(plan.new_slots),
            rules=self._rules.pack(plan, rows=bucket.rows),
            has_banned_rows=self._has_banned_rows(plan),
            rows=pack_rows(plan, bucket.rows, padding_slot=self._padding_slot),
            route=self._route(plan),
            targets=pack_targets(plan.scored, rows=bucket.rows),
        )

    def _loop(self, plan: StepPlan, bucket: Bucket) -> PackedLoop:
        loop = choose_loop(bucket, self._route(plan), routes=self._routes, steps=self._decode_steps)
        how = loop_layout(loop, self._page_size)
        inputs = pack_steps(plan, how, padding_slot=self._padding_slot)
        return PackedLoop(num_rows=plan.num_rows, loop=loop, copies=plan.copies, inputs=inputs)

    def _note(self, new_slots: Sequence[SlotParams]) -> None:
        for params in new_slots:
            self._route_Z[params.slot] = slot_route(params, self._routes)
            self._banned_until_Z[params.slot] = params.banned_until if params.stop_ids else 0

    def _first_pages(self, new_slots: Sequence[SlotParams]) -> list[Int32s]:
        parts = _parts([params for params in new_slots if params.pages])
        return [pack_pages(part, self._pages_per_slot, padding_slot=self._padding_slot) for part in parts]

    def _admissions(self, new_slots: Sequence[SlotParams]) -> list[Int32s]:
        return [pack_params(part, padding_slot=self._padding_slot) for part in _parts(new_slots)]

    def _has_banned_rows(self, plan: StepPlan) -> bool:
        """Whether a row samples a token that may not be one of its stop ids yet."""
        is_banned = plan.starts + plan.counts < self._banned_until_Z[plan.slots]
        return bool(np.count_nonzero(is_banned & plan.samples))

    def _route(self, plan: StepPlan) -> Route:
        """The cheapest route that serves all rows of a step."""
        wanted = self._route_Z[plan.slots[plan.samples]]
        return Route(np.maximum.reduce(wanted)) if len(wanted) else self._routes[0]


def _parts(new_slots: Sequence[SlotParams]) -> list[Sequence[SlotParams]]:
    return [new_slots[first : first + ADMISSIONS] for first in range(0, len(new_slots), ADMISSIONS)]
