"""POST /v1/completions: texts or token ids, continued."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.engine.choices import ChoiceDelta
from albireo_jax.serving.api_errors import check_model, value_errors_as_400
from albireo_jax.serving.auth import cache_salt
from albireo_jax.serving.dependencies import EngineDependency
from albireo_jax.serving.engine_calls import encode_all, open_stream, prepare
from albireo_jax.serving.openai_logprobs import CompletionLogprobsWriter, prompt_logprobs
from albireo_jax.serving.openai_objects import Heading, UsageCounter
from albireo_jax.serving.openapi import body_answers, body_docs
from albireo_jax.serving.request_body import json_body
from albireo_jax.serving.request_id import request_id
from albireo_jax.serving.schemas.answer_objects import CompletionAnswer
from albireo_jax.serving.schemas.completion_bodies import CompletionBody, num_top
from albireo_jax.serving.sse import (
    ChoiceEvents,
    DeltaEvents,
    EachDelta,
    EventStream,
    event,
    read_to_end,
    stream_events,
)
from albireo_jax.serving.stream_chunks import Chunks
from albireo_jax.text.detokenizer import TextOffsets
from albireo_jax.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=body_docs(CompletionBody),
    responses=body_answers(CompletionAnswer, chunk=CompletionAnswer),
)
async def create_completion(
    request: Request,
    engine: EngineDependency,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
) -> Response:
    """Continue each prompt n times; choice p * n + i is sample i of prompt p."""
    check_model(body.model, engine.served_name)
    heading = Heading.new("cmpl", engine.served_name, request_id=request_id(request, body.request_id))
    with value_errors_as_400(CompletionBody):
        params = body.filled(engine.frontend.defaults).sampling_params(DEFAULT_MAX_TOKENS)
        prompts = body.prompts()
        special = body.add_special_tokens is not False
        whole_ids = await encode_all(
            engine.frontend,
            prompts,
            add_special_tokens=special,
            must_fit=body.truncate_prompt_tokens is None,
        )
        room = engine.limits.max_sequence_len - (params.max_tokens or 1)
        prompt_ids = [body.truncated(ids, room=room) for ids in whole_ids]
        await prepare(engine.frontend, params)
        writers = [
            _ChoiceWriter(engine.tokenizer, body, prompt, prompt_ids=ids, params=params)
            for prompt, ids in zip(prompts, prompt_ids, strict=True)
            for _ in range(params.n)
        ]
        usage = UsageCounter(sum(map(len, prompt_ids)), n=params.n, shown=body.generates)
        chunks = Chunks(heading, "text_completion", usage=usage, options=body.stream_options)
        choices = [writer.events(chunks, i) for i, writer in enumerate(writers)] if body.stream else []
        salt = cache_salt(request.headers, body.cache_salt)
        # Last, since nothing that fails behind it would close it.
        stream = await open_stream(
            engine.frontend, prompt_ids, params, cache_salt=salt, priority=body.priority or 0
        )

    if body.stream:
        interval = request.app.state.stream_interval
        sent = stream_events(stream, choices, usage=usage, last_event=chunks.last_event, interval=interval)
        return EventStream(stream, sent)
    done = await read_to_end(stream, request.receive)
    written = [writers[completion.choice].write(completion.as_delta()) for completion in done]
    usage.count(done)
    return JSONResponse(heading.object("text_completion", choices=written, usage=usage.object()))


class _ChoiceWriter:
    """Writes the deltas of one choice as objects of `choices`, the first with what is echoed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: CompletionBody,
        prompt: str | Sequence[int],
        *,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
    ) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._prompt_ids = prompt_ids
        self._echo = ""
        self._unsaid_prompt_ids = list(prompt_ids)
        if body.echo and isinstance(prompt, str) and body.truncate_prompt_tokens is None:
            self._echo = prompt
        elif body.echo:
            self._echo = tokenizer.decode(prompt_ids, skip_special_tokens=False)
        self._logprobs = CompletionLogprobsWriter(
            tokenizer,
            num_top=num_top(body.logprobs),
            as_ids=bool(body.return_tokens_as_token_ids),
            offsets=TextOffsets(
                tokenizer, params, prompt_token_ids=prompt_ids, echo=self._echo if body.echo else None
            ),
        )

    def write(self, delta: ChoiceDelta) -> dict[str, Any]:
        """The object of the next delta."""
        body = self._body
        if not body.generates:  # the token that was sampled is shown to nobody
            ended = delta.finish_reason and FinishReason.LENGTH
            delta = ChoiceDelta(delta.choice, "", (), ended, None, (), delta.prompt_logprobs)
        echo, self._echo = self._echo, ""
        choice: dict[str, Any] = {
            "index": delta.choice,
            "text": echo + delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"], self._unsaid_prompt_ids = self._unsaid_prompt_ids or None, []
        if body.logprobs is not None:
            echoed_ids = self._prompt_ids if body.echo and delta.prompt_logprobs else ()
            echoed_logprobs = delta.prompt_logprobs if body.echo else ()
            choice["logprobs"] = self._logprobs.write(
                (*echoed_ids, *delta.token_ids), (*echoed_logprobs, *delta.logprobs)
            )
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, delta.prompt_logprobs, num_top=num_top(body.prompt_logprobs)
            )
        return choice

    def events(self, chunks: Chunks, index: int) -> DeltaEvents:
        """Turns the deltas into events."""
        body = self._body

        def chunk(delta: ChoiceDelta) -> dict[str, Any]:
            return chunks.object(self.write(delta))

        if body.logprobs is not None or body.return_token_ids or chunks.is_counted or not body.generates:
            return EachDelta(chunk)
        opening = event(chunk(ChoiceDelta(index, "", (), None, None))) if self._echo else b""
        return ChoiceEvents(index, chunk, opening=opening)
