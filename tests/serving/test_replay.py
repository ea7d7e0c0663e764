"""The server takes back every message that it sent, and every route renders a conversation alike."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.messages import read_conversation
from tests.labs.script_lab import HELLO, TIME, WEATHER, chat_template, script_client, script_tokenizer

GO_ON = {"role": "user", "content": "Go on."}
CALLS = {
    ToolFormat.HERMES: '<tool_call>{"name": "weather", "arguments": %s}</tool_call>',
    ToolFormat.LLAMA3_JSON: '{"name": "weather", "parameters": %s}',
    ToolFormat.MISTRAL: "[TOOL_CALLS]weather[ARGS]%s",
}
ARGUMENTS = ('{"city": "Rome"}', "{}", "null", '{"city": True,}', '{"city": oh}', '{"city": "Ro', "3")


def _answers(format: ToolFormat) -> list[str]:
    call = CALLS[format]
    written = [call % arguments for arguments in ARGUMENTS]
    return [
        "",
        "Fine.",
        "<think>Hm",
        "<think>Hm</think>",
        "<think>Hm</think>\nFine.",
        *written,
        f"<think>Hm</think>{written[0]}",
        f"Well.\n{written[0]}\n{written[1]}",
        f"{written[0]}{written[4]}",
    ]


def _messages(client: openai.OpenAI, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """An answer as it came, without its nulls, without its reasoning, and as a stream's deltas add up."""
    options = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, TIME], "seed": seed, **options}
    message = client.chat.completions.create(**options).choices[0].message.model_dump()
    yield message
    yield {name: value for name, value in message.items() if value is not None}
    yield {name: value for name, value in message.items() if "reasoning" not in name}
    added: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in client.chat.completions.create(stream=True, **options):
        delta = chunk.choices[0].delta
        added["content"] += delta.content or ""
        for call in delta.tool_calls or []:
            if call.id:
                function = {"name": call.function.name, "arguments": ""}
                added["tool_calls"].append({"id": call.id, "type": "function", "function": function})
            added["tool_calls"][-1]["function"]["arguments"] += call.function.arguments or ""
    yield added


@pytest.mark.parametrize("format", CALLS)
def test_every_answer_is_taken_back(format: ToolFormat) -> None:
    answers = _answers(format)
    with script_client(chat_template(format, thinks=True), *answers) as client:
        for seed, limit in itertools.product(range(len(answers)), (None, 3, 25)):
            for message in _messages(client, seed, max_tokens=limit):
                results = [
                    {"role": "tool", "tool_call_id": call["id"], "content": "done"}
                    for call in message.get("tool_calls") or []
                ]
                back = client.chat.completions.create(
                    model="tiny",
                    messages=[*HELLO, message, *results, GO_ON],
                    tools=[WEATHER],
                    max_tokens=1,
                    extra_body={"seed": 1},
                )
                assert back.choices[0].finish_reason in ("length", "stop", "tool_calls"), message


CONVERSATIONS: list[list[dict[str, Any]]] = [
    HELLO,
    [{"role": "developer", "content": "Be brief."}, *HELLO],
    [
        {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        *HELLO,
    ],
    [*HELLO, {"role": "assistant", "content": None, "refusal": None, "reasoning": "Hm."}, GO_ON],
    [
        *HELLO,
        {"role": "assistant", "tool_calls": [{"function": {"name": "time", "arguments": ""}}]},
        {"role": "tool", "content": "12"},
    ],
    [{"role": "critic", "content": "Bad.", "mood": "low"}, *HELLO],
    [*HELLO, {"role": "assistant", "content": ""}, GO_ON],
]
WRONG: list[list[dict[str, Any]]] = [
    [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
    [{"role": "assistant", "function_call": {"name": "f"}}],
    [{"role": "", "content": "x"}],
]
FIELDS: list[dict[str, Any]] = [
    {},
    {"tools": [WEATHER, TIME]},
    {"tools": [WEATHER], "tool_choice": "none"},
    {"chat_template_kwargs": {"opening": "<think>"}},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
]


def test_every_route_renders_alike() -> None:
    template = chat_template(ToolFormat.HERMES).replace(
        "{{ opening }}", "{% if add_generation_prompt %}>{% endif %}{{ opening }}"
    )
    tokenizer = script_tokenizer(template)
    with script_client(template, "ok") as client:
        base = str(client.base_url).removesuffix("/v1/")

        def tokens(messages: list[dict[str, Any]], fields: dict[str, Any]) -> list[int]:
            answer = httpx.post(f"{base}/tokenize", json={"messages": messages, **fields})
            assert answer.status_code == httpx.codes.OK, answer.text
            return answer.json()["tokens"]

        for messages, fields in itertools.product(CONVERSATIONS, FIELDS):
            if fields.get("continue_final_message") and messages[-1].get("content") is None:
                continue
            body = {
                "messages": messages,
                "model": "tiny",
                "seed": 0,
                "return_token_ids": True,
                "max_tokens": 1,
            }
            chat = httpx.post(f"{base}/v1/chat/completions", json={**body, **fields}).json()
            token_ids = tokens(messages, fields)
            assert chat["prompt_token_ids"] == token_ids, (messages, fields)
            arguments = {
                name: value
                for name, value in fields.items()
                if name not in ("tool_choice", "chat_template_kwargs")
            }
            if fields.get("tool_choice") == "none":
                del arguments["tools"]
            arguments |= fields.get("chat_template_kwargs", {})
            assert tokenizer.encode_chat(messages, **arguments) == token_ids


def test_every_route_refuses_alike() -> None:
    with script_client(chat_template(ToolFormat.HERMES), "ok") as client:
        base = str(client.base_url).removesuffix("/v1/")
        for messages in WRONG:
            with pytest.raises(ValueError, match=r"messages\[0\]"):
                read_conversation(messages)
            for path in ("/tokenize", "/v1/chat/completions"):
                answer = httpx.post(f"{base}{path}", json={"messages": messages})
                assert answer.status_code == httpx.codes.BAD_REQUEST, messages
                assert answer.json()["error"]["param"].startswith("messages.0")
        both = {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}
        for path in ("/tokenize", "/v1/chat/completions"):
            error = httpx.post(f"{base}{path}", json=both).json()["error"]
            assert "exclude each other" in error["message"]


def test_a_message_is_continued_where_it_ends() -> None:
    template = chat_template(thinks=True)
    with script_client(template, "and so on.</think>Fine.", "Fine.") as client:
        for seed, begun, reasoning, content in (
            (0, "<think>Well, ", "and so on.", "Fine."),
            (1, "It is ", None, "Fine."),
        ):
            answer = client.chat.completions.create(
                model="tiny",
                messages=[*HELLO, {"role": "assistant", "content": begun}],
                seed=seed,
                extra_body={"continue_final_message": True, "return_token_ids": True},
            )
            message = answer.choices[0].message.model_dump()
            assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
            prompt = script_tokenizer(template).decode(answer.prompt_token_ids, skip_special_tokens=False)
            assert json.loads(prompt[prompt.rindex('"content": ') + 11 :] + '"') == begun
