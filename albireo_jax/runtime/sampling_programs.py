"""The sampling programs: from a step's logits and the parameters in slots to the last token of each slot.

They are apart from the forward pass, so that few of them serve all its buckets, and so that the host, which
knows what the rows of a step ask for, picks the cheapest (`sampling.routes`)::

    forward ──▶ logits, split over the vocabulary ──(ban)──▶ sample (by route) ──▶ ids ──▶ last_token
                                                      ▲        ▲
    admit: parameters of new slots ──▶ params ────────┴────────┘

Ids that some row may not sample yet are taken out of the logits by a program of its own (`min_tokens`): a
sampling that could do so would have to copy all logits, in every step.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.plan import SlotParams
from albireo_jax.ops.cuda.kernels import LaunchFn, architecture_of, launch_on
from albireo_jax.runtime.batch import SampleInputs, unpack_bans, unpack_params, unpack_rows
from albireo_jax.runtime.state import SamplerState, sampler_specs
from albireo_jax.runtime.step import StepProgram
from albireo_jax.sampling.logits import ban
from albireo_jax.sampling.routes import Route, route_of, sample_by


class SampleOutput(NamedTuple):
    """The sampler's state after a step, and one sampled id per row."""

    state: SamplerState
    id_R: Int32[Array, " R"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingCost:
    """The cost of a sampling program for a step; seconds are 0 until they were measured."""

    route: str
    wire_bytes: int
    seconds: float = 0.0


def routes(program: StepProgram) -> tuple[Route, ...]:
    """The routes that an engine uses, cheapest first; the last one serves any rows.

    GPUs do without candidates: whether these suffice is known on the device, and the host would wait for it.
    """
    if program.sampling is SamplingMode.REPLICATED and program.mesh.size > 1:
        return (Route.REPLICATED,)
    if program.mesh.size == 1 or program.is_on_gpus:
        return Route.GREEDY, Route.UNFILTERED, Route.ALL_TO_ALL
    return Route.GREEDY, Route.UNFILTERED, Route.CANDIDATES, Route.ALL_TO_ALL


def choose_sampling(mesh: Mesh) -> LaunchFn | None:
    """The function that launches the CUDA kernels of sampling; None where there are no NVIDIA GPUs."""
    device = mesh.devices.flat[0]
    return launch_on(architecture_of(device)) if device.platform == "gpu" else None


def slot_route(params: SlotParams, usable: tuple[Route, ...]) -> Route:
    """The cheapest of the usable routes that serves the row of a slot."""
    wanted = route_of(params.sampling)
    return next(route for route in usable if route >= wanted)


def jit_sample(program: StepProgram, route: Route) -> jax.stages.Wrapped:
    """The jitted sampling of a step's rows: (state, logits_RV, buffer) -> SampleOutput; donates the state."""
    body = jax.shard_map(
        partial(_sample, program, route),
        mesh=program.mesh,
        in_specs=(sampler_specs(), PartitionSpec(None, program.axis), PartitionSpec()),
        out_specs=SampleOutput(sampler_specs(), PartitionSpec()),  # type: ignore[arg-type]
        check_vma=False,  # ids are equal on all ranks by the final gather, which the checker cannot see
    )
    return jax.jit(body, donate_argnums=(0,), compiler_options=program.graph_options)


def jit_ban(program: StepProgram) -> jax.stages.Wrapped:
    """(params_ZF, logits_RV, buffer of `batch.pack_rows`) -> logits_RV without those of banned ids.

    The logits given stay, because log probabilities are theirs.
    """

    def change(
        params_ZF: Int32[Array, "Z F"], logits_Rv: Float[Array, "R v"], buffer_W: Int32[Array, " W"]
    ) -> Array:
        return ban_rows(program, params_ZF, logits_Rv, inputs=unpack_rows(buffer_W))

    split = PartitionSpec(None, program.axis)
    body = jax.shard_map(
        change,
        mesh=program.mesh,
        in_specs=(PartitionSpec(), split, PartitionSpec()),
        out_specs=split,
    )
    return jax.jit(body)


@partial(jax.jit, donate_argnums=(0,))
def admit(state: SamplerState, admission_AX: Int32[Array, "A X"]) -> SamplerState:
    """The state with the parameters of new slots, as `batch.pack_params` wrote them."""
    return state._replace(params_ZF=state.params_ZF.at[admission_AX[:, 0]].set(admission_AX[:, 1:]))


def ban_rows(
    program: StepProgram,
    params_ZF: Int32[Array, "Z F"],
    logits_Rv: Float[Array, "R v"],
    *,
    inputs: SampleInputs,
) -> Float[Array, "R v"]:
    """A rank's share of the logits without the stop ids of rows that may not end yet."""
    with jax.named_scope("ban"):
        bans = unpack_bans(params_ZF, inputs)
        return ban(logits_Rv, bans, first=lax.axis_index(program.axis) * logits_Rv.shape[1])


def sample_rows(
    program: StepProgram,
    route: Route,
    state: SamplerState,
    *,
    logits_Rv: Float[Array, "R v"],
    inputs: SampleInputs,
) -> SampleOutput:
    """The sampling of a step's rows on one rank, inside the `shard_map`; slots remember what they sample."""
    with jax.named_scope("sample"):
        params = unpack_params(state.params_ZF, inputs)
        id_R = sample_by(route, logits_Rv, params, axis=program.axis, launch=program.sample_launch)
        padding_slot = state.last_token_Z.shape[0] - 1
        slot_R = jnp.where(inputs.samples_R, inputs.slot_R, padding_slot)
        return SampleOutput(state._replace(last_token_Z=state.last_token_Z.at[slot_R].set(id_R)), id_R)


def _sample(
    program: StepProgram,
    route: Route,
    state: SamplerState,
    logits_Rv: Float[Array, "R v"],
    buffer_W: Int32[Array, " W"],
) -> SampleOutput:
    return sample_rows(program, route, state, logits_Rv=logits_Rv, inputs=unpack_rows(buffer_W))
