"""The programs that score tokens, fed by few rows at a time: they serve all buckets.

::

    hidden states of all tokens ──take──▶ C hidden states ──head──▶ logits ──┐
    logits of all rows, ids ──────take──▶ C rows of logits, ids ─────────────┴──▶ scores of C tokens
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from albireo_jax.nn.decoder import Head, head_specs, logits
from albireo_jax.runtime.step import StepProgram
from albireo_jax.sampling.logprobs import RowScores, score_rows


class Sampled(NamedTuple):
    """Logits of rows, split over the vocabulary, and the ids sampled from them."""

    logits_RV: Float[Array, "R V"]
    id_R: Int32[Array, " R"]


@jax.jit
def take_hidden(hidden_TD: Float[Array, "T D"], index_C: Int32[Array, " C"]) -> Float[Array, "C D"]:
    """Some of the hidden states of a step."""
    return hidden_TD[index_C]


@jax.jit
def take_sampled(sampled: Sampled, index_C: Int32[Array, " C"]) -> Sampled:
    """Some of the rows of a step."""
    return Sampled(sampled.logits_RV[index_C], sampled.id_R[index_C])


def jit_score_sampled(program: StepProgram, *, num_top: int) -> jax.stages.Wrapped:
    """The jitted (sampled) -> RowScores."""

    def score(sampled: Sampled) -> RowScores:
        return score_rows(sampled.logits_RV, sampled.id_R, num_top=num_top, axis=program.collective_axis)

    return _jit(program, score, specs=(sampled_specs(program),), options=program.graph_options)


def jit_score_hidden(program: StepProgram, *, num_top: int) -> jax.stages.Wrapped:
    """The jitted (head, hidden_CD, id_C) -> RowScores of the ids after these hidden states."""

    def score(head: Head, hidden_CD: Float[Array, "C D"], id_C: Int32[Array, " C"]) -> RowScores:
        logits_Cv = logits(program.model, head, hidden_CD, axis=program.collective_axis)
        return score_rows(logits_Cv, id_C, num_top=num_top, axis=program.collective_axis)

    specs = (head_specs(), PartitionSpec(), PartitionSpec())
    return _jit(program, score, specs=specs, options=program.compiler_options)


def sampled_specs(program: StepProgram) -> Sampled:
    """Partition of `Sampled`: logits by vocabulary, ids on every rank."""
    return Sampled(PartitionSpec(None, program.axis), PartitionSpec())  # type: ignore[arg-type]


def _jit(
    program: StepProgram,
    score: Callable[..., RowScores],
    *,
    specs: tuple[Any, ...],
    options: Mapping[str, str],
) -> jax.stages.Wrapped:
    mapped = jax.shard_map(
        score,
        mesh=program.mesh,
        in_specs=specs,
        out_specs=RowScores(*([PartitionSpec()] * 4)),  # type: ignore[arg-type]
        check_vma=False,  # equal on all ranks by the gather, which the checker cannot see
    )
    return jax.jit(mapped, compiler_options={**options})
