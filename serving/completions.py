"""POST /v1/completions: texts or token ids, continued."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from albireo_jax.engine.turns import ChoiceDelta, Completion
from albireo_jax.serving.body import body_docs, json_body
from albireo_jax.serving.events import ChoiceEvents, EventStream, event, read_to_end, turn_events
from albireo_jax.serving.schemas import CompletionBody
from albireo_jax.serving.served import Engine
from albireo_jax.serving.turns import Heading, callers_fault, check_model, encode, prepare, usage

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_docs(CompletionBody))
async def create_completion(
    request: Request,
    engine: Engine,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
) -> Response:
    """Continue each prompt n times; choice p * n + i is sample i of prompt p."""
    check_model(body.model, engine.served_name)
    heading = Heading.new("cmpl", engine.served_name)
    with callers_fault(CompletionBody):
        params = body.sampling_params(DEFAULT_MAX_TOKENS)
        prompts = body.prompts()
        special = body.add_special_tokens is not False
        prompt_ids = [await encode(engine.frontend, prompt, add_special_tokens=special) for prompt in prompts]
        await prepare(engine.frontend, params)
        turn = engine.frontend.stream_async(prompt_ids, params)
    echoes = [_text(engine, prompt) if body.echo else "" for prompt in prompts for _ in range(params.n)]
    num_prompt_tokens = sum(map(len, prompt_ids))

    def last_event(num_generated: int) -> bytes:
        if not body.wants_usage:
            return b""
        final = heading.object("text_completion", choices=[], usage=usage(num_prompt_tokens, num_generated))
        return event(final)

    if body.stream:
        choices = [_choice_events(heading, index, echo) for index, echo in enumerate(echoes)]
        return EventStream(turn, turn_events(turn, choices, last_event))
    done = await read_to_end(turn, request.receive)
    return JSONResponse(_answer(heading, done, echoes, num_prompt_tokens))


def _text(engine: Engine, prompt: str | Sequence[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return engine.tokenizer.decode(prompt, skip_special_tokens=False)


def _choice_events(heading: Heading, index: int, echo: str) -> ChoiceEvents:
    def chunk(delta: ChoiceDelta) -> dict[str, Any]:
        return heading.object("text_completion", choices=[_choice(delta, delta.text)])

    opening = event(chunk(ChoiceDelta(index, echo, (), None, None))) if echo else b""
    return ChoiceEvents(index, chunk, opening=opening)


def _answer(
    heading: Heading, done: Sequence[Completion], echoes: Sequence[str], num_prompt_tokens: int
) -> dict[str, Any]:
    num_generated = sum(len(completion.token_ids) for completion in done)
    return heading.object(
        "text_completion",
        choices=[_choice(completion, echoes[completion.choice] + completion.text) for completion in done],
        usage=usage(num_prompt_tokens, num_generated),
    )


def _choice(outcome: ChoiceDelta | Completion, text: str) -> dict[str, Any]:
    return {
        "index": outcome.choice,
        "text": text,
        "logprobs": None,
        "finish_reason": outcome.finish_reason,
        "stop_reason": outcome.stop_reason,
    }
