"""The executor packs a plan, launches compiled programs on it, and reads sampled ids back one step late.

A step is two calls: a forward pass, and a sampling of its logits. There is a third if it admits requests, and
one before them if some of these begin with pages that are computed already. `logit_rule_calls`, `min_tokens`
and `logprob_calls` add theirs for rows that have rules, may not end yet or are scored. The device runs the
calls in order, without the host in between::

    host    pack, forward, admit, sample │ next plan ...         │ wait: ids
    device         [ forward ................ ][ admit ][ sample ]──▶ copy of the ids

A plan of several steps is one call instead (`decode_loop`).
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
from jax.sharding import Sharding

from albireo_jax.core.plan import CopyCosts, Int32s, SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.runtime.batch import (
    ADMISSIONS,
    SLOT_FIELDS,
    Bucket,
    layout,
    pack_padding,
    pack_padding_rows,
    pack_pages,
    pack_params,
)
from albireo_jax.runtime.compile import Progress, compile_all
from albireo_jax.runtime.decode_loop import DecodeLoop, DecodeLoops, LoopOutput
from albireo_jax.runtime.handles import CopyHandle, JaxStepHandle, LastStepEnd, StepCopies
from albireo_jax.runtime.logit_rule_calls import LogitRuleCalls, LogitRuleProgram
from albireo_jax.runtime.logprob_calls import LogprobCalls, LogprobProgram, PendingLogprobs
from albireo_jax.runtime.min_tokens import MinTokensCalls, MinTokensProgram
from albireo_jax.runtime.packed_step import PackedCopies, PackedLoop, PackedStep, StepPacker
from albireo_jax.runtime.sampling_programs import (
    SampleOutput,
    SamplingCost,
    admit,
    jit_sample,
    routes,
)
from albireo_jax.runtime.state import DeviceState, PlannedState
from albireo_jax.runtime.step import ForwardOutput, StepProgram, begin_with_pages, jit_forward
from albireo_jax.runtime.transfer import CopiedBytes, CopyProgram, HostPages
from albireo_jax.sampling.logits import Rules
from albireo_jax.sampling.routes import Route, wire_bytes

_ADMIT = "admit"
_BEGIN = "begin with pages"
_TIMED_REPEATS = 5
_DRAWN = TokenSampling(temperature=0.8, top_p=0.9, seed=0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A sampling program: for so many rows, by this route. A tuple would equal some bucket."""

    rows: int
    route: Route


_Program = (
    Bucket | Sampling | MinTokensProgram | DecodeLoop | LogitRuleProgram | LogprobProgram | CopyProgram | str
)
"""Names of the executor's programs."""


class JaxExecutor:
    """Runs plans on the devices of a mesh, in order; one thread calls it.

    Holds the weights and the donated state. All programs are compiled in `__init__`, so `dispatch`
    never compiles: an AOT executable refuses what it was not compiled for. Only then is the state made, which
    fills the memory: to choose a product's kernel on a GPU, XLA tries some, with operands of their own, as
    large as a layer's weights, or as the stack of all layers' where they are stacked.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: DecoderWeights,
        state: PlannedState,
        *,
        buckets: tuple[Bucket, ...],
        rules: Rules,
        max_len: int,
        max_logprobs: int,
        num_host_pages: int = 0,
        decode_steps: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.program = program
        self._cache, self._sampler = state.arrays  # for lowering; made below
        self._buckets = buckets
        self._scoring = LogprobCalls(program, weights, num_top=max_logprobs)
        self._loops = DecodeLoops(program, max_steps=decode_steps)
        self.replace_weights(weights)
        self._padding_slot = self._sampler.last_token_Z.shape[0] - 1
        self._ruled = LogitRuleCalls(program, rules, max_len=max_len)
        self._banned = MinTokensCalls(program)
        self._host_pages = HostPages(
            self._cache.kv, program.mesh, axis=program.axis, num_host_pages=num_host_pages
        )
        self._in_flight: deque[JaxStepHandle | CopyHandle] = deque()
        self._ends = LastStepEnd()
        self._routes = routes(program)
        self._packer = StepPacker(
            buckets,
            self._ruled.shape,
            routes=self._routes,
            page_size=program.page_size,
            pages_per_slot=self._cache.page_table_ZM.shape[1],
            decode_steps=decode_steps,
        )
        row_counts = sorted({bucket.rows for bucket in buckets})
        samplings = [Sampling(rows, route) for rows in row_counts for route in self._routes]
        self._costs = {sampling: self._cost(sampling) for sampling in samplings}
        self._compiled = compile_all(self._programs(row_counts, state.arrays), progress=progress)
        for calls in (self._ruled, self._banned, self._scoring, self._loops, self._host_pages):
            calls.use(self._compiled)
        self._cache, self._sampler = state.make()

    def _programs(
        self, row_counts: Sequence[int], state: DeviceState
    ) -> dict[_Program, Callable[[], jax.stages.Lowered]]:
        """All programs, ready to be lowered, for a state of these shapes and shardings."""
        return (
            {_ADMIT: self._lower_admit, _BEGIN: self._lower_begin}
            | self._ruled.programs(row_counts)
            | self._banned.programs(row_counts, state.sampler)
            | self._scoring.programs(self._buckets)
            | self._host_pages.programs()
            | self._loops.programs(self._buckets, state)
            | {bucket: partial(self.lower, bucket) for bucket in self._buckets}
            | {sampling: partial(self.lower_sampling, sampling) for sampling in self._costs}
        )

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The forward program of a bucket, lowered for this engine's shapes and devices."""
        shape = layout(bucket, self.program.page_size)
        weights = self._weights[bucket]
        forward = jit_forward(self.program, shape, weights)
        return forward.lower(
            weights, self._cache, self._sampler.last_token_Z, self.program.ints(shape.num_words)
        )

    def lower_sampling(self, sampling: Sampling) -> jax.stages.Lowered:
        """A sampling program, lowered for this engine's shapes and devices."""
        return jit_sample(self.program, sampling.route).lower(
            self._sampler, self.program.logits(sampling.rows), self.program.ints(3 * sampling.rows)
        )

    def compiled(self, name: Bucket | Sampling | DecodeLoop) -> jax.stages.Compiled:
        """The executable of a bucket's forward pass, of a kind of sampling, or of a loop of both."""
        return self._compiled[name]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes that steps are padded to."""
        return self._buckets

    def sampling_costs(self) -> dict[Sampling, SamplingCost]:
        """The cost of each kind of sampling, for each number of rows the cheapest first."""
        return self._costs.copy()

    @property
    def copied(self) -> CopiedBytes:
        """Bytes of pages copied between the devices and the host so far."""
        return self._host_pages.copied

    def dispatch(self, plan: StepPlan) -> JaxStepHandle | CopyHandle:
        """Queue a step on the devices; returns before it has run.

        Its copies come first. Without rows they are all of it: there is no forward pass.
        """
        self._poll()
        packed = self._packer.pack(plan)
        started = self._host_pages.run(self._cache.kv, packed.copies)
        self._cache = self._cache._replace(kv=started.kv)
        match packed:
            case PackedStep():
                handle = self._launch_step(packed, started.copies)
            case PackedLoop():
                handle = self._launch_loop(packed, started.copies)
            case PackedCopies():
                moving = jax.tree.leaves(started.moving)
                handle = CopyHandle(moving, copies=started.copies, ends=self._ends)
        self._poll()
        self._in_flight.append(handle)
        return handle

    def _launch_step(self, step: PackedStep, copies: StepCopies) -> JaxStepHandle:
        """Queue the forward pass of a step and the sampling of its rows."""
        for table_rows in step.first_pages:
            self._begin(table_rows)
        forward = self._forward(step.bucket, step.inputs)
        for admission in step.admissions:
            self._admit(admission)
        self._ruled.write(step.rules)
        logits_RV = self._ruled.apply(step.rules, forward.logits_RV)
        if step.has_banned_rows:
            logits_RV = self._banned.apply(self._sampler, logits_RV, rows=step.rows)
        sampling = Sampling(step.bucket.rows, step.route)
        id_R = self._sample(sampling, logits_RV, step.rows)
        self._ruled.note(step.rules, id_R)
        return JaxStepHandle(
            id_R,
            step.num_rows,
            scores=self._scoring.score(step.targets, forward, id_R),
            sampling=self._costs[sampling],
            copies=copies,
            ends=self._ends,
        )

    def _launch_loop(self, step: PackedLoop, copies: StepCopies) -> JaxStepHandle:
        """Queue all steps of rows that go on by themselves."""
        state = DeviceState(self._cache, self._sampler)
        done: LoopOutput = self._loops.run(step.loop, step.inputs, state)
        self._cache, self._sampler = done.state
        return JaxStepHandle(
            done.result_XR,
            step.num_rows,
            scores=PendingLogprobs([]),
            sampling=self._costs[Sampling(step.loop.rows, step.loop.route)],
            copies=copies,
            ends=self._ends,
        )

    def _forward(self, bucket: Bucket, inputs: Int32s) -> ForwardOutput:
        """Queue a forward pass; `inputs` is its buffer.

        The call itself transfers the buffer. A `device_put` before it costs more, and its array takes a
        slower way into the executable.
        """
        forward: ForwardOutput = self._compiled[bucket](
            self._weights[bucket], self._cache, self._sampler.last_token_Z, inputs
        )
        self._cache = forward.cache
        return forward

    def _sample(self, sampling: Sampling, logits_RV: jax.Array, rows: Int32s) -> jax.Array:
        """Queue the sampling of rows; their ids. `rows` is its buffer."""
        sampled: SampleOutput = self._compiled[sampling](self._sampler, logits_RV, rows)
        self._sampler = sampled.state
        return sampled.id_R

    def replace_weights(self, weights: DecoderWeights) -> None:
        """Compute all later steps with other arrays of the same shapes, dtypes and shardings."""
        arranged = {
            loop: self.program.arrange(weights, bucket)
            for loop, bucket in {self.program.layer_loop(bucket): bucket for bucket in self._buckets}.items()
        }
        self._scoring.use_weights(weights)
        self._loops.use_weights(arranged, weights)
        self._weights = {bucket: arranged[self.program.layer_loop(bucket)] for bucket in self._buckets}

    def warm_up(self) -> None:
        """Run every program once on padding; call it before the first step, and after all measurements.

        A GPU loads kernels and records CUDA graphs when a program first runs. It drops the graphs of all
        programs when another one is compiled, so nothing is after this.
        """
        self._admit(pack_params((), padding_slot=self._padding_slot))
        pages_per_slot = self._cache.page_table_ZM.shape[1]
        self._begin(pack_pages((), pages_per_slot, padding_slot=self._padding_slot))
        warm: set[int] = set()
        for bucket in self._buckets:
            forward, rows = self._run_padding(bucket), bucket.rows
            samplings = [Sampling(rows, route) for route in self._routes]
            *_, id_R = (self._sample_padding(sampling, forward.logits_RV) for sampling in samplings)
            self._scoring.warm_up(forward, id_R)
            if rows not in warm:
                padding = pack_padding_rows(rows, padding_slot=self._padding_slot)
                self._banned.apply(self._sampler, forward.logits_RV, rows=padding)
                self._ruled.warm_up(forward.logits_RV, id_R)
            warm.add(rows)
        state = self._loops.warm_up(self._buckets, DeviceState(self._cache, self._sampler))
        self._cache, self._sampler = state
        self._cache = self._cache._replace(kv=self._host_pages.warm_up(self._cache.kv))
        jax.block_until_ready(self._sampler.last_token_Z)

    def measure_sampling(self) -> None:
        """Time each sampling program alone, so that later results tell it from the forward pass.

        Call it before the first step: the rows that it samples are padding.
        """
        samplings = [name for name in self._compiled if isinstance(name, Sampling)]
        for rows in dict.fromkeys(sampling.rows for sampling in samplings):
            wanted = self.program.logits(rows)
            logits_RV = _random_logits(wanted.shape, wanted.sharding)
            for sampling in [name for name in samplings if name.rows == rows]:
                seconds = self._median_s(sampling, logits_RV)
                self._costs[sampling] = replace(self._costs[sampling], seconds=seconds)
        self._admit_padding(GREEDY)

    def measure_copies(self) -> CopyCosts:
        """Time copies from the host and the forward pass, so that one can be weighed against the other.

        Call it before the first step, of an engine that has host pages.
        """
        measured = self._host_pages.measure(self._cache.kv)
        self._cache = self._cache._replace(kv=measured.kv)
        largest = max(self._buckets)
        smallest = min(bucket for bucket in self._buckets if bucket.is_decode)
        return CopyCosts(
            page_s=measured.times.arrive_s + measured.times.write_s,
            token_s=self._forward_s(largest) / largest.tokens,
            wait_s=2 * self._forward_s(smallest),
        )

    def _forward_s(self, bucket: Bucket) -> float:
        """Median seconds of the forward pass of a bucket full of padding."""
        times_s: list[float] = []
        for _ in range(_TIMED_REPEATS + 1):
            began_s = time.perf_counter()
            self._run_padding(bucket).logits_RV.block_until_ready()
            times_s.append(time.perf_counter() - began_s)
        return statistics.median(times_s[1:])

    def _run_padding(self, bucket: Bucket) -> ForwardOutput:
        """Queue the forward pass of a bucket full of padding."""
        shape = layout(bucket, self.program.page_size)
        return self._forward(bucket, pack_padding(shape, padding_slot=self._padding_slot))

    def _cost(self, sampling: Sampling) -> SamplingCost:
        rows, columns = self.program.logits(sampling.rows).shape
        moved = wire_bytes(sampling.route, rows=rows, columns=columns, ranks=self.program.mesh.size)
        return SamplingCost(route=sampling.route.name.lower(), wire_bytes=moved)

    def _median_s(self, sampling: Sampling, logits_RV: jax.Array) -> float:
        """Median seconds of sampling rows that filter, or that are greedy where no others are served."""
        self._admit_padding(GREEDY if sampling.route is Route.GREEDY else _DRAWN)
        times_s: list[float] = []
        for _ in range(_TIMED_REPEATS + 1):
            started_s = time.perf_counter()
            self._sample_padding(sampling, logits_RV).block_until_ready()
            times_s.append(time.perf_counter() - started_s)
        return statistics.median(times_s[1:])

    def _sample_padding(self, sampling: Sampling, logits_RV: jax.Array) -> jax.Array:
        """Queue the sampling of rows that are all padding; their ids."""
        rows = pack_padding_rows(sampling.rows, padding_slot=self._padding_slot)
        return self._sample(sampling, logits_RV, rows)

    def _begin(self, table_rows: Int32s) -> None:
        """Write the pages that new slots begin with, which the step's forward pass reads."""
        table_ZM = self._compiled[_BEGIN](self._cache.page_table_ZM, table_rows)
        self._cache = self._cache._replace(page_table_ZM=table_ZM)

    def _admit(self, admission: Int32s) -> None:
        """Write the parameters of new slots, which the step's sampling reads."""
        self._sampler = self._compiled[_ADMIT](self._sampler, admission)

    def _admit_padding(self, sampling: TokenSampling) -> None:
        """Write how the slot of padding rows is sampled."""
        params = SlotParams(slot=self._padding_slot, sampling=sampling, banned_until=0, stop_ids=())
        self._admit(pack_params((params,), padding_slot=self._padding_slot))

    def _lower_admit(self) -> jax.stages.Lowered:
        return admit.lower(self._sampler, self.program.ints(ADMISSIONS, 1 + SLOT_FIELDS))

    def _lower_begin(self) -> jax.stages.Lowered:
        table_ZM = self._cache.page_table_ZM
        return begin_with_pages.lower(table_ZM, self.program.ints(ADMISSIONS, 1 + table_ZM.shape[1]))

    def _poll(self) -> None:
        while self._in_flight and self._in_flight[0].poll():
            self._in_flight.popleft()
        for handle in self._in_flight:
            handle.poll()


@partial(jax.jit, static_argnums=(0, 1))
def _random_logits(shape: tuple[int, int], sharding: Sharding) -> jax.Array:
    """Logits as peaked as a language model's."""
    return jax.lax.with_sharding_constraint(4 * jax.random.normal(jax.random.key(0), shape), sharding)
