"""Requests through an engine's loop, step by step, for their tokens."""

from collections.abc import Sequence

from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop


def answers_of(loop: EngineLoop, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """The tokens of each request, all offered at once; raises RuntimeError if one ends without its tokens."""
    for request in requests:
        loop.scheduler.add(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while loop.has_work:
        for output in loop.step():
            if output.token_id is not None:
                answers[output.request_id].append(output.token_id)
    for request in requests:
        if len(answers[request.request_id]) != request.max_tokens:
            raise RuntimeError(
                f"request {request.request_id} got {len(answers[request.request_id])} tokens, "
                f"{request.max_tokens} were asked for"
            )
    return [tuple(tokens) for tokens in answers.values()]
