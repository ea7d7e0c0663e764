"""A loop on the device of several decode steps in one dispatch: it computes each token that it has sampled.

::

    buffer ──▶ pages of all steps ──▶ ┌─▶ forward ──▶ logits ──▶ sample ──▶ last_token ─┐ ──▶ ids, counts
                                      └──────────── until every row has ended ◀─────────┘

A row ends by itself: once it has sampled as many tokens as it was given, one among its stop ids, or none
because its logits were not finite. From then on it is padding, in the place where it was: it computes a token
of the null page in the slot that is no request's. The loop ends when all rows have.

The next loop can be queued before the results of this one are known. A row that goes on has sampled all that
it was given, so the host knows where it stands; and a row that ended in this loop shows it by its last token,
which is on the device, and does nothing in the next one. So nothing is computed behind a stop, at any depth::

    depth 2   host     plan 1  plan 2             commit 1  plan 3
              device           [ 1: a b c d ][ 2: e f g h ][ 3: ...        a row that goes on
                               [ 1: a b EOS ][ 2:         ]                a row that ends: seen by commit 1

Its price: tokens come in bursts, and a request that arrives or aborts waits for the loops that are queued.
Rows with rules, masks or scores need other programs, or the host, between two tokens and take single steps
(`sched.multi_step`).

One GPU runs a loop by itself, as one CUDA graph (`StepProgram.loop_options`; jax 0.12 compiles it so, 0.11
does not). Over several, unless `StepProgram.graph_collectives` is set, XLA's host thread runs it: it waits
for the condition before each step, so a dispatch returns when its last step is queued, and depth 2 hides no
more than the commit.

Two programs serve each number of rows: one for greedy rows, by the cheapest route, and one for any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int32
from numpy.typing import NDArray

from albireo_jax.core.plan import Int32s, StepPlan
from albireo_jax.nn.decoder import DecoderWeights, unstack, weight_specs
from albireo_jax.runtime.batch import (
    Bucket,
    BufferLayout,
    SampleInputs,
    StepInputs,
    pack,
    pack_padding,
    unpack,
    unpack_stop_ids,
)
from albireo_jax.runtime.sampling_programs import ban_rows, routes, sample_rows
from albireo_jax.runtime.state import CacheState, DeviceState, SamplerState, cache_specs, sampler_specs
from albireo_jax.runtime.step import LayerLoop, StepProgram, forward_rows, update_pages
from albireo_jax.sampling.routes import Route


class LoopOutput(NamedTuple):
    """The state after a loop, and what its rows sampled: ids of each step, and behind them how many count."""

    state: DeviceState
    result_XR: Int32[Array, "X R"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoop:
    """A loop over `rows` rows for `steps` steps at most, which samples by one route."""

    rows: int
    route: Route
    steps: int


class _Fixed(NamedTuple):
    """The inputs that all steps share."""

    weights: DecoderWeights
    inputs: StepInputs
    params_ZF: Int32[Array, "Z F"]
    stop_id_RB: Int32[Array, "R B"]


class _Progress(NamedTuple):
    """The state after so many steps, and the number of steps after which each row has ended or will have."""

    step: Int32[Array, ""]
    cache: CacheState
    last_token_Z: Int32[Array, " Z"]
    id_XR: Int32[Array, "X R"]
    end_R: Int32[Array, " R"]


class DecodeLoops:
    """The loops of an engine, of `max_steps` steps at most; 1 has no programs.

    Inside a loop a GPU's products cannot read a layer's slice of a stack in place, as they do outside: each
    step would copy all layers. So where steps read the stack in place, loops read arrays of each layer's own,
    which are then a second copy of the layers.
    """

    def __init__(self, program: StepProgram, *, max_steps: int) -> None:
        scanned = program.layers is LayerLoop.SCANNED
        self._program = program if scanned else replace(program, layers=LayerLoop.UNSTACKED)
        self._max_steps = max_steps
        self._routes = _loop_routes(routes(program))
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}

    def use_weights(self, arranged: Mapping[LayerLoop, DecoderWeights], weights: DecoderWeights) -> None:
        """Compute with these weights from now on, in their form among the `arranged` ones or one made now."""
        if self._max_steps > 1:
            form = self._program.layers
            self._weights = arranged[form] if form in arranged else unstack(weights)

    def programs(
        self, buckets: Sequence[Bucket], state: DeviceState
    ) -> dict[DecodeLoop, Callable[[], jax.stages.Lowered]]:
        """All programs, ready to be lowered, for the decode steps among the buckets."""
        if self._max_steps == 1:
            return {}
        loops = [
            DecodeLoop(rows=bucket.rows, route=route, steps=self._max_steps)
            for bucket in buckets
            if bucket.is_decode
            for route in self._routes
        ]
        return {loop: partial(self.lower, loop, self._weights, state) for loop in loops}

    def use(self, compiled: Mapping[Any, jax.stages.Compiled]) -> None:
        """Run these executables of `programs` from now on."""
        self._compiled = compiled

    def lower(self, loop: DecodeLoop, weights: DecoderWeights, state: DeviceState) -> jax.stages.Lowered:
        """A program, lowered for weights and a state of these shapes and shardings."""
        words = self._layout(loop).num_words + loop.rows
        return jit_decode(self._program, loop, weights).lower(weights, state, self._program.ints(words))

    def run(self, loop: DecodeLoop, inputs: Int32s, state: DeviceState) -> LoopOutput:
        """Queue the steps whose buffer `inputs` is; donates the state."""
        return self._compiled[loop](self._weights, state, inputs)

    def warm_up(self, buckets: Sequence[Bucket], state: DeviceState) -> DeviceState:
        """The state after every loop has run once, a step of padding; donates the state."""
        padding_slot = state.sampler.last_token_Z.shape[0] - 1
        for loop in self.programs(buckets, state):
            words = pack_padding(self._layout(loop), padding_slot=padding_slot)
            steps = np.ones(loop.rows, np.int32)
            done: LoopOutput = self._compiled[loop](self._weights, state, np.concatenate((words, steps)))
            state = done.state
        return state

    def _layout(self, loop: DecodeLoop) -> BufferLayout:
        return loop_layout(loop, self._program.page_size)


def _loop_routes(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    """The routes of loops among those of an engine: the cheapest, and the one that serves any rows."""
    return tuple(dict.fromkeys((routes[0], routes[-1])))


def choose_loop(bucket: Bucket, route: Route, *, routes: tuple[Route, ...], steps: int) -> DecodeLoop:
    """The loop of `steps` steps for a bucket whose rows `route`, one of the engine's `routes`, serves."""
    serving = next(each for each in _loop_routes(routes) if each >= route)
    return DecodeLoop(rows=bucket.rows, route=serving, steps=steps)


def loop_layout(loop: DecodeLoop, page_size: int) -> BufferLayout:
    """Offsets of a loop's buffer, behind which are the steps of each row."""
    num_updates = loop.rows * -(-loop.steps // page_size)
    return BufferLayout(bucket=Bucket(loop.rows, loop.rows), num_updates=num_updates)


def pack_steps(plan: StepPlan, layout: BufferLayout, *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh buffer with all that the plan's steps need: that of a forward pass, and each row's steps."""
    steps = np.zeros(layout.bucket.rows, np.int32)
    steps[: plan.num_rows] = plan.steps
    return np.concatenate((pack(plan, layout, padding_slot=padding_slot), steps))


def jit_decode(program: StepProgram, loop: DecodeLoop, weights: DecoderWeights) -> jax.stages.Wrapped:
    """The jitted loop: (weights, state, buffer) -> LoopOutput; donates the state.

    `weights` only tells which fields there are.
    """
    specs = DeviceState(cache_specs(program.axis), sampler_specs())
    body = jax.shard_map(
        partial(_decode, program, loop),
        mesh=program.mesh,
        in_specs=(weight_specs(weights), specs, PartitionSpec()),
        out_specs=LoopOutput(specs, PartitionSpec()),  # type: ignore[arg-type]
        check_vma=False,  # as in sampling: ids are equal on all ranks, which the checker cannot see
    )
    options = program.compiler_options | program.loop_options
    return jax.jit(body, donate_argnums=(1,), compiler_options=options)


def _decode(
    program: StepProgram,
    loop: DecodeLoop,
    weights: DecoderWeights,
    state: DeviceState,
    buffer_W: Int32[Array, " W"],
) -> LoopOutput:
    sampler = state.sampler
    with jax.named_scope("inputs"):
        inputs = unpack(buffer_W[: -loop.rows], loop_layout(loop, program.page_size))
        stop_id_RB = unpack_stop_ids(sampler.params_ZF[inputs.slot_R])
        is_over_R = _is_end(sampler.last_token_Z[inputs.slot_R], stop_id_RB)
        begin = _Progress(
            step=jnp.int32(0),
            cache=update_pages(state.cache, inputs),
            last_token_Z=sampler.last_token_Z,
            id_XR=jnp.zeros((loop.steps, loop.rows), jnp.int32),
            end_R=jnp.where(is_over_R, 0, buffer_W[-loop.rows :]),
        )
    fixed = _Fixed(weights, inputs, sampler.params_ZF, stop_id_RB)
    end = lax.while_loop(
        lambda at: at.step < at.end_R.max(), partial(_step, program, loop.route, fixed), begin
    )
    return LoopOutput(
        DeviceState(end.cache, sampler._replace(last_token_Z=end.last_token_Z)),
        jnp.concatenate((end.id_XR, end.end_R[None])),
    )


def _step(program: StepProgram, route: Route, fixed: _Fixed, at: _Progress) -> _Progress:
    """One step of the rows that have not ended; the others are padding."""
    inputs = fixed.inputs
    runs_R = at.step < at.end_R
    start_R = jnp.where(runs_R, inputs.start_R + at.step, 0)
    padding_slot = at.last_token_Z.shape[0] - 1
    forward = forward_rows(
        program,
        fixed.weights,
        at.cache,
        inputs=inputs._replace(slot_R=jnp.where(runs_R, inputs.slot_R, padding_slot), start_R=start_R),
        last_token_Z=at.last_token_Z,
    )
    samples = SampleInputs(inputs.slot_R, start_R + 1, runs_R)
    sampled = sample_rows(
        program,
        route,
        SamplerState(at.last_token_Z, fixed.params_ZF),
        logits_Rv=ban_rows(program, fixed.params_ZF, forward.logits_RV, inputs=samples),
        inputs=samples,
    )
    ends_R = runs_R & _is_end(sampled.id_R, fixed.stop_id_RB)
    return _Progress(
        step=at.step + 1,
        cache=forward.cache,
        last_token_Z=sampled.state.last_token_Z,
        id_XR=at.id_XR.at[at.step].set(sampled.id_R),
        end_R=jnp.where(ends_R, at.step + 1, at.end_R),
    )


def _is_end(id_R: Int32[Array, " R"], stop_id_RB: Int32[Array, "R B"]) -> Bool[Array, " R"]:
    """Whether nothing follows a token: it is one of its row's stop ids, or NOT_FINITE."""
    return (id_R < 0) | (id_R[:, None] == stop_id_RB).any(axis=1)
