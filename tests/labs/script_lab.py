"""Known answers over HTTP: the shipped control plane over a device that says what it is told."""

import asyncio
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import openai
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.service import EngineService
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.serving.app import create_app
from albireo_jax.serving.chat_requests import ChatRequest, parse_chat
from albireo_jax.serving.request_body import parse_body
from albireo_jax.serving.schemas.chat_bodies import ChatBody
from albireo_jax.sim.lanes import Clock
from albireo_jax.text.answers.answer_formats import ToolFormat, answer_format
from albireo_jax.text.grammar.compiler import GrammarCompiler
from albireo_jax.text.grammar.mask_threads import ThreadedMaskMaker
from albireo_jax.text.tokenizer import Tokenizer
from albireo_jax.text.tokenizer_parts import TokenizerParts
from tests.labs.engine_lab import END, LIMITS, START, Lab, byte_piece
from tests.labs.http_lab import served

SPECIAL = (START, END, "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")
TEMPLATES = {  # what the messages hold, and how the model was taught to call
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3_JSON: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.NONE: "",
}
CHAT_TEMPLATE = (
    "{%% if tools %%}{{ tools | tojson }}{%% endif %%}"
    "{%% for message in messages %%}{{ message | tojson }}{%% endfor %%}{# %s #}{{ opening }}"
)
HELLO = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "description": "Now."}}


class ScriptedExecutor:
    """A device that says a known text in answer to each request, told by the request's seed."""

    def __init__(self, scripts: Sequence[Sequence[int]], clock: Clock) -> None:
        self._scripts = scripts
        self._clock = clock
        self._script = dict[int, Sequence[int]]()
        self._origin = dict[int, int]()

    def dispatch(self, plan: StepPlan) -> "Said":
        for params in plan.new_slots:
            self._script[params.slot] = self._scripts[params.sampling.seed or 0]
            self._origin.pop(params.slot, None)
        ids = np.zeros(plan.num_rows, np.int32)
        for row in np.flatnonzero(plan.samples).tolist():
            slot, position = int(plan.slots[row]), int(plan.starts[row] + plan.counts[row])
            said = position - self._origin.setdefault(slot, position)
            ids[row] = self._script[slot][min(said, len(self._script[slot]) - 1)]
        self._clock.advance_to(self._clock() + 1e-3)
        return Said(SampledTokens(ids=ids, finished_s=self._clock()))


class Said:
    """The sampled tokens of a scripted step."""

    def __init__(self, sampled: SampledTokens) -> None:
        self._sampled = sampled

    def wait(self) -> SampledTokens:
        return self._sampled


def script_backend() -> Backend:
    """One token per ASCII character, and the special tokens that models have."""
    pieces = [byte_piece(chr(code)) for code in (*range(32, 127), 10)]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return backend


def script_tokenizer(template: str) -> Tokenizer:
    """The tokens of `script_backend`, and a chat template."""
    backend = script_backend()
    return Tokenizer(
        TokenizerParts(
            backend=backend,
            bos_token_id=None,
            eos_token_ids=(backend.token_to_id(END),),
            special_tokens={"bos_token": START, "eos_token": END},
            chat_templates={"default": template},
        )
    )


@contextmanager
def script_client(template: str, *answers: str, **app_options: Any) -> Generator[openai.OpenAI, None, None]:
    """A client of a server whose answer to seed i is `answers[i]`."""
    tokenizer = script_tokenizer(template)
    limits = replace(LIMITS, vocab_size=tokenizer.vocab_size)
    scripts = [tokenizer.encode(answer + END) for answer in answers]
    clock = Clock()
    timeline = Timeline(clock=clock)
    config = SchedulerConfig(max_rows=8, max_step_tokens=256, depth=2)
    scheduler = Scheduler(config, limits, mask_maker=ThreadedMaskMaker())
    loop = EngineLoop(scheduler, ScriptedExecutor(scripts, clock), depth=2, timeline=timeline)
    compiler = GrammarCompiler(tokenizer, vocab_size=limits.vocab_size, eos_token_ids=tokenizer.eos_token_ids)
    service = EngineService(loop, limits, compiler=compiler)
    frontend = Frontend(service, tokenizer, limits=limits, eos_token_ids=tokenizer.eos_token_ids)
    lab = Lab(
        served_name="tiny",
        limits=limits,
        tokenizer=tokenizer,
        timeline=timeline,
        service=service,
        frontend=frontend,
    )
    try:
        with (
            served(create_app(lab, **app_options)) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client
        assert service.drain(60)
        assert service.stats().pages_in_use == 0
    finally:
        frontend.close()


def chat_template(format: ToolFormat = ToolFormat.NONE, *, thinks: bool = False) -> str:
    return CHAT_TEMPLATE % (TEMPLATES[format] + ("<think>" if thinks else ""))


def asked_for(template: str, **fields: Any) -> ChatRequest:
    body = parse_body(json.dumps({"messages": HELLO, **fields}).encode(), ChatBody)
    return asyncio.run(parse_chat(script_tokenizer(template), answer_format(template), body))
