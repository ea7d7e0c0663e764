"""POST /v1/chat/completions: the assistant's next message, with its reasoning and its tool calls."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from albireo_jax.core.types import FinishReason
from albireo_jax.engine.choices import ChoiceDelta, Completion
from albireo_jax.serving.api_errors import check_model, value_errors_as_400
from albireo_jax.serving.auth import cache_salt
from albireo_jax.serving.chat_requests import ChatRequest, parse_chat
from albireo_jax.serving.dependencies import EngineDependency, FormatDependency
from albireo_jax.serving.engine_calls import open_stream, prepare
from albireo_jax.serving.openai_logprobs import ChatLogprobsWriter, prompt_logprobs
from albireo_jax.serving.openai_objects import Heading, UsageCounter
from albireo_jax.serving.openapi import body_answers, body_docs
from albireo_jax.serving.request_body import json_body
from albireo_jax.serving.request_id import request_id
from albireo_jax.serving.schemas.answer_objects import ChatAnswer, ChatChunk
from albireo_jax.serving.schemas.chat_bodies import ChatBody
from albireo_jax.serving.schemas.completion_bodies import num_top
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
from albireo_jax.text.answers.answer_reader import (
    Answer,
    AnswerEvent,
    AnswerReader,
    ReasoningText,
)
from albireo_jax.text.answers.call_reader import ArgumentsText, CallBegun, CallEnded, ContentText
from albireo_jax.text.answers.reasoning import Thinking
from albireo_jax.text.token_logprobs import TokenLogprob

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    openapi_extra=body_docs(ChatBody),
    responses=body_answers(ChatAnswer, chunk=ChatChunk),
)
async def create_chat_completion(
    request: Request,
    engine: EngineDependency,
    format: FormatDependency,
    *,
    body: Annotated[ChatBody, Depends(json_body(ChatBody))],
) -> Response:
    """Answer a conversation n times; without max_tokens an answer may fill the context."""
    check_model(body.model, engine.served_name)
    heading = Heading.new("chatcmpl", engine.served_name, request_id=request_id(request, body.request_id))
    with value_errors_as_400(ChatBody):
        longest, defaults = engine.limits.max_sequence_len, engine.frontend.defaults
        context_len = longest if body.truncate_prompt_tokens is None else None
        asked = await parse_chat(engine.tokenizer, format, body.filled(defaults), context_len=context_len)
        asked = asked.with_prompt(body.truncated(asked.prompt_ids, room=longest - (body.max_tokens or 1)))
        asked = asked.with_default_max_tokens(defaults.max_tokens, longest=longest)
        await prepare(engine.frontend, asked.params)
        samples = range(asked.params.n)
        usage = UsageCounter(len(asked.prompt_ids), n=asked.params.n)
        chunks = Chunks(heading, "chat.completion.chunk", usage=usage, options=body.stream_options)
        shows_ids = bool(body.return_token_ids)
        events = [
            _choice_events(chunks, index, asked, shows_ids=shows_ids) for index in samples if body.stream
        ]
        salt = cache_salt(request.headers, body.cache_salt)
        # Last, since nothing that fails behind it would close it.
        stream = await open_stream(
            engine.frontend, [asked.prompt_ids], asked.params, cache_salt=salt, priority=body.priority or 0
        )

    if body.stream:
        interval = request.app.state.stream_interval
        sent = stream_events(stream, events, usage=usage, last_event=chunks.last_event, interval=interval)
        return EventStream(stream, sent)
    done = await read_to_end(stream, request.receive)
    usage.count(done)
    choices = [_answered(completion, asked, shows_ids=shows_ids) for completion in done]
    answer = heading.object("chat.completion", choices=choices, usage=usage.object())
    if shows_ids:
        answer["prompt_token_ids"] = list(asked.prompt_ids)
    if body.prompt_logprobs is not None and done:
        answer["prompt_logprobs"] = prompt_logprobs(
            engine.tokenizer, done[0].prompt_logprobs, num_top=num_top(body.prompt_logprobs)
        )
    return JSONResponse(answer)


class _MessageEvents:
    """Events of a choice whose answer is read for reasoning and calls."""

    def __init__(
        self,
        chunks: Chunks,
        opening: Callable[[], bytes],
        reader: AnswerReader,
        *,
        logprobs: ChatLogprobsWriter,
        shows_ids: bool,
    ) -> None:
        self._chunks = chunks
        self._opening = opening
        self._reader = reader
        self._has_called = self._has_broken = False
        self._logprobs = logprobs
        self._shows_ids = shows_ids
        self._unsaid: tuple[TokenLogprob, ...] = ()
        self._unsaid_ids: tuple[int, ...] = ()

    def encode(self, delta: ChoiceDelta) -> bytes:
        """The events of a delta; none while its text waits.

        Token ids and log probabilities go with the first chunk after their tokens.
        """
        read = self._reader.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            read += self._reader.finish()
        self._has_called |= any(isinstance(part, CallBegun) for part in read)
        self._has_broken |= any(isinstance(part, CallEnded) and part.broken != "" for part in read)
        opening, self._opening = self._opening(), bytes
        middle = delta._replace(finish_reason=None, stop_reason=None)
        choices = [
            _choice(middle, delta=content) for content in map(_delta_content, read) if content is not None
        ]
        if delta.finish_reason is not None:
            has_called = self._has_called and not self._has_broken  # or a client would read what is no JSON
            choices.append(_choice(delta, has_called=has_called, delta={}))
        self._unsaid += delta.logprobs
        self._unsaid_ids += delta.token_ids
        if choices:
            choices[0]["logprobs"] = self._logprobs.write(self._unsaid)
            if self._shows_ids:
                choices[0]["token_ids"] = list(self._unsaid_ids)
            self._unsaid, self._unsaid_ids = (), ()
        return opening + b"".join(event(self._chunks.object(choice)) for choice in choices)


def _delta_content(part: AnswerEvent) -> dict[str, Any] | None:
    """The `delta` of a chunk; None for what a stream does not say."""
    match part:
        case ContentText(text):
            return {"content": text}
        case ReasoningText(text):
            return _reasoning(text)
        case CallBegun(call, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": call, "id": id, "type": "function", "function": function}]}
        case ArgumentsText(call, text):
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}
        case _:
            return None


def _reasoning(text: str | None) -> dict[str, str | None]:
    """Under the name that most clients read, and under the one that vLLM gave it later."""
    return {"reasoning_content": text, "reasoning": text}


def _choice_events(chunks: Chunks, index: int, asked: ChatRequest, *, shows_ids: bool) -> DeltaEvents:
    """The events of a choice: who speaks, then what."""

    def chunk(delta: ChoiceDelta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        choice = _choice(delta, delta=content)
        choice["logprobs"] = asked.logprobs.write(delta.logprobs)
        if shows_ids:
            choice["token_ids"] = list(delta.token_ids)
        return chunks.object(choice)

    speaker = {"role": "assistant", "content": "", "refusal": None}
    role = _choice(ChoiceDelta(index, "", (), None, None), delta=speaker)
    prompt = {"prompt_token_ids": list(asked.prompt_ids)} if shows_ids else {}

    def opening() -> bytes:
        return event(chunks.object(role, **prompt))

    reader = asked.reader()
    if reader is not None:
        return _MessageEvents(chunks, opening, reader, logprobs=asked.logprobs, shows_ids=shows_ids)
    if asked.params.logprobs is not None or shows_ids or chunks.is_counted:
        return EachDelta(chunk, opening=opening)
    return ChoiceEvents(index, chunk, opening=opening())


def _answered(completion: Completion, asked: ChatRequest, *, shows_ids: bool) -> dict[str, Any]:
    reader = asked.reader()
    if reader is None:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = _choice(completion, message=message)
    else:
        cut_off = completion.finish_reason is FinishReason.LENGTH
        answer = reader.read(completion.text, cut_off=cut_off)
        choice = _choice(completion, has_called=bool(answer.calls), message=_message(answer, asked))
    choice["logprobs"] = asked.logprobs.write(completion.logprobs)
    if shows_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice


def _message(answer: Answer, asked: ChatRequest) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if not answer.content and (answer.calls or answer.reasoning):
        message["content"] = None
    if asked.thinking is not Thinking.OVER:
        message |= _reasoning(answer.reasoning or None)
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def _choice(
    outcome: ChoiceDelta | Completion, *, has_called: bool = False, **content: dict[str, Any]
) -> dict[str, Any]:
    """A choice, which stopped for its calls if it stopped by itself after one."""
    stopped_to_call = has_called and outcome.finish_reason is FinishReason.STOP
    return {
        "index": outcome.choice,
        **content,
        "logprobs": None,
        "finish_reason": "tool_calls" if stopped_to_call else outcome.finish_reason,
        "stop_reason": outcome.stop_reason,
    }
