"""From the body of a chat to what the engine is asked: prompt, parameters, and how to read the answer."""

from dataclasses import dataclass, replace
from functools import partial

from albireo_jax.core.types import SamplingParams, StructuredOutput
from albireo_jax.serving.engine_calls import RENDERING, run_in_thread_if_long
from albireo_jax.serving.openai_logprobs import ChatLogprobsWriter
from albireo_jax.serving.schemas.chat_bodies import ChatBody
from albireo_jax.serving.schemas.conversation_bodies import ConversationBody
from albireo_jax.text.answers.answer_formats import AnswerFormat, ToolFormat
from albireo_jax.text.answers.answer_reader import AnswerReader
from albireo_jax.text.answers.reasoning import Thinking, thinking
from albireo_jax.text.grammar.tool_grammar import after_reasoning, calls_grammar, either
from albireo_jax.text.messages import text_of
from albireo_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A body understood: what to generate, and how to read what comes."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    tools: ToolFormat
    thinking: Thinking
    parallel: bool
    logprobs: ChatLogprobsWriter

    def with_prompt(self, prompt_ids: tuple[int, ...]) -> "ChatRequest":
        """The same with another prompt."""
        return replace(self, prompt_ids=prompt_ids)

    def with_default_max_tokens(self, default: int | None, *, longest: int) -> "ChatRequest":
        """The same; without a limit of its own an answer ends at the model's `default`, if it fits."""
        if default is None or self.params.max_tokens is not None:
            return self
        room = longest - len(self.prompt_ids)
        if room < 1:
            return self  # the prompt is refused later
        max_tokens = max(min(default, room), min(self.params.min_tokens, room))
        return replace(self, params=replace(self.params, max_tokens=max_tokens))

    def reader(self) -> AnswerReader | None:
        """A reader for one answer; None where an answer is nothing but content."""
        if self.tools is ToolFormat.NONE and self.thinking is Thinking.OVER:
            return None
        return AnswerReader(self.tools, self.thinking, parallel=self.parallel)


async def parse_chat(
    tokenizer: Tokenizer, format: AnswerFormat, body: ChatBody, *, context_len: int | None = None
) -> ChatRequest:
    """Render the prompt and find out what is constrained. Raises ValueError for what cannot be done.

    A prompt that must have more than `context_len` tokens is refused before it is tokenized.
    """
    params = body.sampling_params(None)
    structured = _constraint(tokenizer, format, body, content=params.structured)
    prompt = await render_chat(tokenizer, format, body)
    encode = partial(tokenizer.encode, add_special_tokens=False, context_len=context_len)
    prompt_ids = await run_in_thread_if_long(len(prompt), lambda: encode(prompt))
    continued = text_of(body.spoken()[-1].message()) if body.continue_final_message else ""
    thinks = thinking(format.reasoning, prompt, continued=continued)
    if structured is not None:
        structured = after_reasoning(structured, thinks, token_id=tokenizer.token_id)
    return ChatRequest(
        prompt_ids=tuple(prompt_ids),
        params=replace(
            params, structured=structured, shown_tokens=format.shown_tokens(tools=body.uses_tools)
        ),
        tools=format.tools if body.uses_tools else ToolFormat.NONE,
        thinking=thinks,
        parallel=body.may_call_several,
        logprobs=ChatLogprobsWriter(
            tokenizer, wanted=bool(body.logprobs), as_ids=bool(body.return_tokens_as_token_ids)
        ),
    )


async def render_chat(tokenizer: Tokenizer, format: AnswerFormat, body: ConversationBody) -> str:
    """The prompt of a conversation, whichever route it came by. Raises ValueError."""
    if body.uses_tools and format.tools is ToolFormat.NONE:
        raise ValueError("tools are not supported: how this model writes tool calls is not known")
    arguments = body.template_arguments(tokenizer.chat_template_source)

    def render() -> str:
        return tokenizer.apply_chat_template(body.chat(), **arguments)

    if body.chat_template_kwargs or not tokenizer.renders_fast:
        return await RENDERING.run(render)
    return await run_in_thread_if_long(body.size(), render, pool=RENDERING)


def _constraint(
    tokenizer: Tokenizer, format: AnswerFormat, body: ChatBody, *, content: StructuredOutput | None
) -> StructuredOutput | None:
    """The constraint of an answer: calls if any are demanded, or else `content`, with calls if offered."""
    offered = body.offered_functions()  # also where they need no grammar, so that bad ones are refused
    demanded = body.demanded_functions()
    functions = demanded or (offered if content is not None else [])
    if not functions:
        return content
    calls = calls_grammar(
        format,
        functions,
        parallel=body.may_call_several,
        token_id=tokenizer.token_id,
        marked=not demanded,  # so that the first token tells them from content
    )
    return calls if demanded or content is None else either(calls, content)
