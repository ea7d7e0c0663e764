"""One engine of a tiny random Llama, and every path by which a caller can ask it for the same thing.

A *wish* is what a caller wants of an answer. It has a spelling for HTTP, often several, and one for Python.
A path takes a wish to the engine and gives the outcome: choices that can be compared over all paths, or the
message of the refusal.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from albireo_jax import LLM, SamplingParams
from albireo_jax.serving.app import create_app
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat
from tests.labs.http_lab import served
from tests.labs.script_lab import END, SPECIAL, TIME, script_backend

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which way?"}]
DEFAULTS: dict[str, Any] = {"seed": 7, "temperature": 1.0, "max_tokens": 24}
MAX_MODEL_LEN = 256
UNMARKED = {ord("<") - 32: -100.0, 96 + SPECIAL.index("<think>"): -100.0}
"""A bias in every wish that keeps answers free of markers, which only some of the paths read as markup."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A set of sampling options, as equivalent HTTP bodies and as arguments of SamplingParams."""

    name: str
    bodies: tuple[dict[str, Any], ...]
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer, as far as every path tells it."""

    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The answers to a wish; or the message that refuses it, and no answers."""

    choices: tuple[Choice, ...] = ()
    num_tokens: int = 0
    refusal: str = ""


Path_ = Callable[[dict[str, Any]], Outcome]


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The paths by name: those of HTTP take a body's fields, those of Python arguments of SamplingParams."""

    llm: LLM
    http: dict[str, Path_]
    python: dict[str, Path_]
    forced_call: Callable[[dict[str, Any]], str]
    post: Callable[[str, dict[str, Any]], httpx.Response] = field(repr=False)


@contextmanager
def open_paths(folder: Path) -> Generator[Paths, None, None]:
    """Every path to one engine of a random model, which is written to `folder`."""
    write_model(folder)
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(str(folder), max_rows=8, max_step_tokens=64))

        def client(**formats: Any) -> httpx.Client:
            app = create_app(llm.engine, **formats)
            url = stack.enter_context(served(app))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        plain = client(tool_call_parser=ToolFormat.NONE, reasoning_parser=ReasoningFormat.NONE)
        thinks = client(tool_call_parser=ToolFormat.NONE, reasoning_parser=ReasoningFormat.QWEN3)
        calls = client(tool_call_parser=ToolFormat.HERMES, reasoning_parser=ReasoningFormat.NONE)
        prompt = llm.engine.tokenizer.apply_chat_template(MESSAGES)
        token_ids = plain.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        http: dict[str, Path_] = {}
        for way, read in (("whole", _whole), ("streamed", _streamed)):
            http[f"completion, {way}"] = _asker(read, plain, "/v1/completions", {"prompt": prompt})
            http[f"completion of token ids, {way}"] = _asker(
                read, plain, "/v1/completions", {"prompt": token_ids}
            )
            chat = "/v1/chat/completions"
            http[f"chat, {way}"] = _asker(read, plain, chat, {"messages": MESSAGES})
            http[f"chat that may reason, {way}"] = _asker(read, thinks, chat, {"messages": MESSAGES})
            beside = {"messages": MESSAGES, "tools": [TIME]}
            http[f"chat beside tools, {way}"] = _asker(read, calls, chat, beside)
        yield Paths(
            llm=llm,
            http=http,
            python={
                "generate": lambda params: _generated(llm, lambda own: llm.generate(prompt, own), params),
                "generate from token ids": lambda params: _generated(
                    llm, lambda own: llm.generate([token_ids], own), params
                ),
                "LLM.chat": lambda params: _generated(llm, lambda own: llm.chat(MESSAGES, own), params),
                "LLM.stream": lambda params: _python_stream(llm, prompt, params),
            },
            forced_call=lambda schema: _forced_call(calls, schema),
            post=lambda path, body: plain.post(path, json=body),
        )


def write_model(folder: Path) -> None:
    """Write a random Llama over one token per character as a Hugging Face folder, chat template and all."""
    backend = script_backend()
    vocab = backend.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": vocab,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": backend.token_to_id(END),
    }
    tokenizer_config = {"eos_token": END, "chat_template": TEMPLATE}
    save_file(_random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    backend.save(str(folder / "tokenizer.json"))


def _random_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names."""
    random = np.random.default_rng(0)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    return {
        name: random.standard_normal(shape, np.float32) / 4 if len(shape) == 2 else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def _asker(
    read: Callable[[httpx.Client, str, dict[str, Any]], Outcome],
    client: httpx.Client,
    path: str,
    prompt: dict[str, Any],
) -> Path_:
    """The path that asks with a body of these fields besides the wish's."""

    def ask(fields: dict[str, Any]) -> Outcome:
        bias = {str(token_id): value for token_id, value in UNMARKED.items()}
        own = fields | {"logit_bias": bias | fields.get("logit_bias", {})}
        if path.endswith("chat/completions") and isinstance(own.get("logprobs"), int):
            own |= {"logprobs": True, "top_logprobs": own["logprobs"]}
        return read(client, path, {**DEFAULTS, **prompt, **own})

    return ask


def _whole(client: httpx.Client, path: str, body: dict[str, Any]) -> Outcome:
    answer = client.post(path, json=body)
    if answer.status_code != 200:
        return _refused(answer)
    said = answer.json()
    choices = (
        Choice(
            text=choice["text"] if "text" in choice else choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
            logprobs=_http_logprobs(choice["logprobs"]),
        )
        for choice in sorted(said["choices"], key=lambda choice: choice["index"])
    )
    return Outcome(choices=tuple(choices), num_tokens=said["usage"]["completion_tokens"])


def _streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> Outcome:
    if "prompt_logprobs" in body:  # a stream has no place for them
        return _whole(client, path, body)
    answer = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    if answer.status_code != 200:
        return _refused(answer)
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    parts: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            parts.setdefault(choice["index"], []).append(choice)
    choices = (
        Choice(
            text="".join(
                part["text"] if "text" in part else part["delta"].get("content") or "" for part in own
            ),
            finish_reason=own[-1]["finish_reason"],
            stop_reason=own[-1]["stop_reason"],
            logprobs=tuple(value for part in own for value in _http_logprobs(part["logprobs"])),
        )
        for _, own in sorted(parts.items())
    )
    return Outcome(choices=tuple(choices), num_tokens=chunks[-1]["usage"]["completion_tokens"])


def _refused(answer: httpx.Response) -> Outcome:
    error = answer.json()["error"]
    assert answer.status_code == 400, f"{answer.status_code}: {error}"
    return Outcome(refusal=error["message"])


def _http_logprobs(logprobs: dict[str, Any] | None) -> tuple[float, ...]:
    if logprobs is None:
        return ()
    if "content" in logprobs:
        return tuple(round(entry["logprob"], 3) for entry in logprobs["content"])
    return tuple(round(value, 3) for value in logprobs["token_logprobs"])


def _sampling_params(params: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**(DEFAULTS | params | {"logit_bias": UNMARKED | params.get("logit_bias", {})}))


def _generated(
    llm: LLM, generate: Callable[[SamplingParams], Sequence[Any]], params: dict[str, Any]
) -> Outcome:
    try:
        generation = generate(_sampling_params(params))[0]
    except ValueError as error:
        return Outcome(refusal=str(error))
    return Outcome(
        choices=tuple(_python_choice([output]) for output in generation.outputs),
        num_tokens=sum(len(output.token_ids) for output in generation.outputs),
    )


def _python_stream(llm: LLM, prompt: str, params: dict[str, Any]) -> Outcome:
    try:
        deltas = list(llm.stream(prompt, _sampling_params(params)))
    except ValueError as error:
        return Outcome(refusal=str(error))
    parts: dict[int, list[Any]] = {}
    for delta in deltas:
        parts.setdefault(delta.choice, []).append(delta)
    return Outcome(
        choices=tuple(_python_choice(own) for _, own in sorted(parts.items())),
        num_tokens=sum(len(delta.token_ids) for delta in deltas),
    )


def _python_choice(parts: Sequence[Any]) -> Choice:
    return Choice(
        text="".join(part.text for part in parts),
        finish_reason=str(parts[-1].finish_reason),
        stop_reason=parts[-1].stop_reason,
        logprobs=tuple(round(entry.logprob, 3) for part in parts for entry in part.logprobs),
    )


def _forced_call(client: httpx.Client, schema: dict[str, Any]) -> str:
    """Arguments of the call that is forced with these parameters."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {**DEFAULTS, "max_tokens": 200, "messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    answer = client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
