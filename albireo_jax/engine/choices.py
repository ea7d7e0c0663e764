"""Choices of a call, and their outputs as text: a delta for each step, and the completion at the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from albireo_jax.core.types import FinishReason, Request, RequestLogprobs
from albireo_jax.text.detokenizer import Detokenizer
from albireo_jax.text.token_logprobs import TokenLogprob, token_logprobs

INCOMPLETE = (FinishReason.ERROR, FinishReason.ABORT)
"""Reasons for which a choice ends that is not complete."""


class ChoiceDelta(NamedTuple):
    """A choice's output of one step; sample i of prompt p is choice p * n + i.

    `text` is empty while a character is incomplete or may begin a stop string. `stop_reason` is the
    stop string or the id among `stop_token_ids` that ended the choice. `logprobs` has an entry per token if
    they were asked for; `prompt_logprobs` come with the first token, one per token of the prompt, None for
    the first of those. The first token also brings how many tokens of the prompt were in the cache.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that a choice came to; log probabilities as in `ChoiceDelta`, empty if not asked for.

    `cached_tokens` of its prompt were in the cache.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0

    def as_delta(self) -> ChoiceDelta:
        """The completion as if it had come at once."""
        return ChoiceDelta(
            self.choice,
            self.text,
            self.token_ids,
            self.finish_reason,
            self.stop_reason,
            self.logprobs,
            self.prompt_logprobs,
            self.cached_tokens,
        )


def merge_deltas(deltas: Sequence[ChoiceDelta]) -> Sequence[ChoiceDelta]:
    """The deltas with those of the same choice put together, in the order in which the choices come first.

    Those that end a choice which is not complete stay by themselves, and come last.
    """
    by_choice: dict[int, list[ChoiceDelta]] = {}
    for delta in deltas:
        if delta.finish_reason not in INCOMPLETE:
            by_choice.setdefault(delta.choice, []).append(delta)
    if len(by_choice) == len(deltas):
        return deltas
    merged = [
        ChoiceDelta(
            choice,
            "".join(part.text for part in parts),
            tuple(token_id for part in parts for token_id in part.token_ids),
            parts[-1].finish_reason,
            parts[-1].stop_reason,
            tuple(entry for part in parts for entry in part.logprobs),
            tuple(entry for part in parts for entry in part.prompt_logprobs),
            sum(part.cached_tokens for part in parts),
        )
        for choice, parts in by_choice.items()
    ]
    return [*merged, *(delta for delta in deltas if delta.finish_reason in INCOMPLETE)]


def collect(deltas: Iterable[ChoiceDelta]) -> list[Completion]:
    """The deltas of a stream that ended, put together by choice."""
    by_choice: dict[int, list[ChoiceDelta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    return [
        Completion(
            choice=choice,
            text="".join(delta.text for delta in parts),
            token_ids=tuple(token_id for delta in parts for token_id in delta.token_ids),
            finish_reason=parts[-1].finish_reason or FinishReason.ABORT,
            stop_reason=parts[-1].stop_reason,
            logprobs=tuple(entry for delta in parts for entry in delta.logprobs),
            prompt_logprobs=tuple(entry for delta in parts for entry in delta.prompt_logprobs),
            cached_tokens=sum(delta.cached_tokens for delta in parts),
        )
        for choice, parts in sorted(by_choice.items())
    ]


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """A request of a stream as its reader sees it.

    `started_s` is when the engine began to compute it, `first_s` and `last_s` when its first and its latest
    token left the engine. `finish_reason` is None until it ended.
    """

    index: int
    request: Request
    detokenizer: Detokenizer
    started_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


def with_logprobs(delta: ChoiceDelta, scores: RequestLogprobs, request: Request) -> ChoiceDelta:
    """The delta with the log probabilities that the request asked for."""
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] = []
    if request.logprobs is not None:
        logprobs = token_logprobs(delta.token_ids, scores.token, num_top=request.logprobs)
    if request.prompt_logprobs is not None and scores.prompt is not None:
        prompt_logprobs.append(None)
        begin = 1
        for piece in scores.prompt:
            token_ids = request.prompt_token_ids[begin : begin + piece.count].tolist()
            prompt_logprobs += token_logprobs(token_ids, piece, num_top=request.prompt_logprobs)
            begin += piece.count
    return delta._replace(logprobs=tuple(logprobs), prompt_logprobs=tuple(prompt_logprobs))
