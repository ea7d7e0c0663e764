"""The calls that score a step's tokens, and their results; a step without targets makes no call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from albireo_jax.core.plan import Int32s, LogprobArrays, LogprobTargets
from albireo_jax.nn.decoder import DecoderWeights, Head, head
from albireo_jax.runtime.batch import Bucket
from albireo_jax.runtime.logprob_programs import (
    Sampled,
    jit_score_hidden,
    jit_score_sampled,
    take_hidden,
    take_sampled,
)
from albireo_jax.runtime.step import ForwardOutput, StepProgram
from albireo_jax.sampling.logprobs import RowScores

_FEW, _MANY = 8, 64
"""Tokens that are scored at once: of rows usually few are wanted, of prompts usually many."""


class LogprobKind(StrEnum):
    """Programs that log-probabilities take, by what each does."""

    TAKE_SAMPLED = "take sampled rows"
    TAKE_HIDDEN = "take hidden states"
    SCORE_SAMPLED = "score sampled tokens"
    SCORE_HIDDEN = "score prompt tokens"


@dataclass(frozen=True, slots=True)
class LogprobProgram:
    """A program that takes `wanted` of `of` rows or tokens, or scores as many; `of` is 0 if it scores."""

    kind: LogprobKind
    wanted: int
    of: int = 0


class RowPiece(NamedTuple):
    """Rows whose sampled tokens one call scores; the first `wanted` count."""

    row_C: Int32s
    wanted: int


class TokenPiece(NamedTuple):
    """Tokens of a step and the ids behind them that one call scores; the first `wanted` count."""

    token_C: Int32s
    next_id_C: Int32s
    wanted: int


class PackedTargets(NamedTuple):
    """The tokens of a step that are scored, cut into pieces of the sizes that programs take."""

    rows: Sequence[RowPiece] = ()
    tokens: Sequence[TokenPiece] = ()


def pack_targets(targets: LogprobTargets, *, rows: int) -> PackedTargets:
    """The targets of a step that is padded to so many rows."""
    if not targets.count:
        return PackedTargets()
    size = _MANY if rows >= _MANY and len(targets.rows) > _FEW else _FEW
    tokens = zip(_pieces(targets.tokens, _MANY), _pieces(targets.next_ids, _MANY), strict=True)
    return PackedTargets(
        [RowPiece(*piece) for piece in _pieces(targets.rows, size)],
        [TokenPiece(token_C, id_C, wanted) for (token_C, wanted), (id_C, _) in tokens],
    )


class _Piece(NamedTuple):
    """Scores on their way to the host; the first `wanted` count."""

    scores: RowScores
    wanted: int


class PendingLogprobs:
    """The scores of a step, on their way to the host."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        for piece in pieces:
            for array in piece.scores:
                array.copy_to_host_async()

    def wait(self) -> LogprobArrays | None:
        """The scores, once they are on the host; None if nothing was scored."""
        if not self._pieces:
            return None
        return LogprobArrays(
            logprobs=self._joined(lambda scores: scores.logprob_R),
            ranks=self._joined(lambda scores: scores.rank_R),
            top_ids=self._joined(lambda scores: scores.top_id_RB),
            top_logprobs=self._joined(lambda scores: scores.top_logprob_RB),
        )

    def _joined(self, field: Callable[[RowScores], jax.Array]) -> NDArray[Any]:
        return np.concatenate([np.asarray(field(piece.scores))[: piece.wanted] for piece in self._pieces])


class LogprobCalls:
    """Scores tokens of the steps of `program`, with the `num_top` likeliest in the place of each.

    `num_top` 0 scores nothing and has no programs.
    """

    def __init__(self, program: StepProgram, weights: DecoderWeights, *, num_top: int) -> None:
        self._program = program
        self._num_top = num_top
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}
        self.use_weights(weights)

    def use_weights(self, weights: DecoderWeights) -> None:
        """Score with the head of these weights from now on."""
        self._head: Head = head(weights)

    def programs(self, buckets: tuple[Bucket, ...]) -> dict[LogprobProgram, Callable[[], jax.stages.Lowered]]:
        """All programs for steps of these buckets, ready to be lowered."""
        if not self._num_top:
            return {}
        rows = sorted({bucket.rows for bucket in buckets})
        tokens = sorted({bucket.tokens for bucket in buckets})
        taken = [(count, of) for of in rows for count in (_FEW, _MANY) if count == _FEW or of >= _MANY]
        scored = sorted({count for count, _ in taken})
        return (
            {
                LogprobProgram(LogprobKind.TAKE_SAMPLED, *sizes): partial(self._lower_take_sampled, *sizes)
                for sizes in taken
            }
            | {
                LogprobProgram(LogprobKind.SCORE_SAMPLED, count): partial(self._lower_score_sampled, count)
                for count in scored
            }
            | {
                LogprobProgram(LogprobKind.TAKE_HIDDEN, _MANY, of): partial(self._lower_take_hidden, of)
                for of in tokens
            }
            | {LogprobProgram(LogprobKind.SCORE_HIDDEN, _MANY): self._lower_score_hidden}
        )

    def use(self, compiled: Mapping[Any, jax.stages.Compiled]) -> None:
        """Run these executables of `programs` from now on."""
        self._compiled = compiled

    def score(self, targets: PackedTargets, forward: ForwardOutput, id_R: jax.Array) -> PendingLogprobs:
        """Queue the scoring of a step's tokens; `forward` has the logits before any rule changed them."""
        sampled = Sampled(forward.logits_RV, id_R)
        return PendingLogprobs(
            [self._score_rows(piece, sampled) for piece in targets.rows]
            + [self._score_tokens(piece, forward.hidden_TD) for piece in targets.tokens]
        )

    def warm_up(self, forward: ForwardOutput, id_R: jax.Array) -> None:
        """Run every program for steps of this size once."""
        if not self._num_top:
            return
        rows, one = len(id_R), np.zeros(1, np.int32)
        targets = [LogprobTargets(rows=one, tokens=one, next_ids=one)]
        if rows >= _MANY:
            targets.append(LogprobTargets(rows=np.zeros(_MANY, np.int32)))
        for each in targets:
            self.score(pack_targets(each, rows=rows), forward, id_R)

    def _score_rows(self, piece: RowPiece, sampled: Sampled) -> _Piece:
        count = len(piece.row_C)
        take = LogprobProgram(LogprobKind.TAKE_SAMPLED, count, len(sampled.id_R))
        taken: Sampled = self._compiled[take](sampled, piece.row_C)
        scores: RowScores = self._compiled[LogprobProgram(LogprobKind.SCORE_SAMPLED, count)](taken)
        return _Piece(scores, piece.wanted)

    def _score_tokens(self, piece: TokenPiece, hidden_TD: jax.Array) -> _Piece:
        count = len(piece.token_C)
        take = LogprobProgram(LogprobKind.TAKE_HIDDEN, count, len(hidden_TD))
        hidden_CD: jax.Array = self._compiled[take](hidden_TD, piece.token_C)
        scores: RowScores = self._compiled[LogprobProgram(LogprobKind.SCORE_HIDDEN, count)](
            self._head, hidden_CD, piece.next_id_C
        )
        return _Piece(scores, piece.wanted)

    def _lower_take_sampled(self, count: int, of: int) -> jax.stages.Lowered:
        return take_sampled.lower(self._sampled(of), self._program.ints(count))

    def _lower_take_hidden(self, of: int) -> jax.stages.Lowered:
        return take_hidden.lower(self._hidden(of), self._program.ints(_MANY))

    def _lower_score_sampled(self, count: int) -> jax.stages.Lowered:
        return jit_score_sampled(self._program, num_top=self._num_top).lower(self._sampled(count))

    def _lower_score_hidden(self) -> jax.stages.Lowered:
        return jit_score_hidden(self._program, num_top=self._num_top).lower(
            self._head, self._hidden(_MANY), self._program.ints(_MANY)
        )

    def _sampled(self, rows: int) -> Sampled:
        return Sampled(self._program.logits(rows), self._program.ints(rows))  # type: ignore[arg-type]

    def _hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        everywhere = NamedSharding(self._program.mesh, PartitionSpec())
        shape, dtype = (tokens, self._program.model.hidden_size), self._head.head_VD.dtype
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


def _pieces(numbers: Int32s, size: int) -> list[tuple[Int32s, int]]:
    """Fresh arrays of `size` numbers, the last one filled up with zeros, and how many of each count."""
    pieces: list[tuple[Int32s, int]] = []
    for first in range(0, len(numbers), size):
        piece = numbers[first : first + size]
        pieces.append((np.pad(piece, (0, size - len(piece))), len(piece)))
    return pieces
