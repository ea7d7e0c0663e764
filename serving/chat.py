"""POST /v1/chat/completions: the assistant's next message."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from albireo_jax.engine.turns import ChoiceDelta, Completion
from albireo_jax.serving.body import body_docs, json_body
from albireo_jax.serving.events import ChoiceEvents, EventStream, event, read_to_end, turn_events
from albireo_jax.serving.schemas import ChatBody
from albireo_jax.serving.served import Engine
from albireo_jax.serving.turns import Heading, callers_fault, check_model, encode, usage

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_docs(ChatBody))
async def create_chat_completion(
    request: Request, engine: Engine, body: Annotated[ChatBody, Depends(json_body(ChatBody))]
) -> Response:
    """Answer a conversation n times; without max_tokens an answer may fill the context."""
    check_model(body.model, engine.served_name)
    heading = Heading.new("chatcmpl", engine.served_name)
    with callers_fault(ChatBody):
        params = body.sampling_params(None)
        prompt_ids = await encode(engine.frontend, body.chat())
        turn = engine.frontend.stream_async([prompt_ids], params)

    def last_event(num_generated: int) -> bytes:
        if not body.wants_usage:
            return b""
        counts = usage(len(prompt_ids), num_generated)
        return event(heading.object("chat.completion.chunk", choices=[], usage=counts))

    if body.stream:
        choices = [_choice_events(heading, index) for index in range(params.n)]
        return EventStream(turn, turn_events(turn, choices, last_event))
    done = await read_to_end(turn, request.receive)
    return JSONResponse(_answer(heading, done, len(prompt_ids)))


def _choice_events(heading: Heading, index: int) -> ChoiceEvents:
    """The events of a choice: who speaks, then what."""

    def chunk(delta: ChoiceDelta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return heading.object("chat.completion.chunk", choices=[_choice(delta, delta=content)])

    role = _choice(ChoiceDelta(index, "", (), None, None), delta={"role": "assistant", "content": ""})
    opening = event(heading.object("chat.completion.chunk", choices=[role]))
    return ChoiceEvents(index, chunk, opening=opening)


def _answer(heading: Heading, done: Sequence[Completion], num_prompt_tokens: int) -> dict[str, Any]:
    return heading.object(
        "chat.completion",
        choices=[
            _choice(completion, message={"role": "assistant", "content": completion.text})
            for completion in done
        ],
        usage=usage(num_prompt_tokens, sum(len(completion.token_ids) for completion in done)),
    )


def _choice(outcome: ChoiceDelta | Completion, **content: dict[str, str]) -> dict[str, Any]:
    return {
        "index": outcome.choice,
        **content,
        "logprobs": None,
        "finish_reason": outcome.finish_reason,
        "stop_reason": outcome.stop_reason,
    }
