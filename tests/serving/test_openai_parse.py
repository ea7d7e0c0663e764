"""OpenAI's client parses answers into pydantic models of many types: whole, streamed and as tool calls."""

import datetime
import enum
import ipaddress
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr

from albireo_jax.text.answers.answer_formats import ToolFormat
from tests.labs.script_lab import HELLO, chat_template, script_client


class Color(enum.Enum):
    """An enumeration of strings."""

    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    """An enumeration of integers."""

    LOW = 1
    HIGH = 2


class Point(BaseModel):
    """An inner object."""

    x: int
    y: float


class Tree(BaseModel):
    """An object that holds itself."""

    value: int
    children: list["Tree"]


class Cat(BaseModel):
    """One of two kinds."""

    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    """The other."""

    kind: Literal["dog"]
    good: bool


TYPES: dict[str, tuple[Any, str]] = {
    # field -> its type, and a value as the model writes it
    "text": (str, '"é"'),
    "short_text": (Annotated[str, Field(min_length=1, max_length=9)], '"abc"'),
    "pattern": (Annotated[str, Field(pattern=r"^[a-z]+-\d+$")], '"ab-12"'),
    "integer": (int, "7"),
    "bounded": (Annotated[int, Field(ge=0, le=10)], "7"),
    "number": (float, "1.5"),
    "positive": (Annotated[float, Field(gt=0)], "0.5"),
    "flag": (bool, "true"),
    "nothing": (None, "null"),
    "optional": (int | None, "null"),
    "union": (int | str, '"x"'),
    "literal": (Literal["a", "b"], '"b"'),
    "mixed_literal": (Literal["a", 2], "2"),
    "color": (Color, '"red"'),
    "level": (Level, "2"),
    "texts": (list[str], '["a","b"]'),
    "few": (Annotated[list[int], Field(min_length=1, max_length=3)], "[1,2]"),
    "pair": (tuple[int, str], '[1,"a"]'),
    "distinct": (set[int], "[1,2]"),
    "points": (list[Point], '[{"x":1,"y":2.5}]'),
    "point": (Point, '{"x":1,"y":2.5}'),
    "tree": (Tree, '{"value":1,"children":[{"value":2,"children":[]}]}'),
    "animal": (Annotated[Cat | Dog, Field(discriminator="kind")], '{"kind":"dog","good":true}'),
    "moment": (datetime.datetime, '"2024-05-06T07:08:09Z"'),
    "day": (datetime.date, '"2024-05-06"'),
    "time": (datetime.time, '"07:08:09Z"'),
    "duration": (datetime.timedelta, '"P1D"'),
    "id": (uuid.UUID, '"12345678-1234-5678-1234-567812345678"'),
    "money": (Decimal, '"12.50"'),
    "address": (ipaddress.IPv4Address, '"127.0.0.1"'),
    "url": (AnyUrl, '"https://example.com/"'),
    "path": (Path, '"a/b.txt"'),
    "secret": (SecretStr, '"xyz"'),
    "raw": (bytes, '"abc"'),
    "described": (Annotated[int, Field(description="How many.", title="Count", examples=[1])], "3"),
}


def _model(name: str) -> type[BaseModel]:
    kind, _ = TYPES[name]
    return type("Answer", (BaseModel,), {"__annotations__": {"value": kind}, "__module__": __name__})


def _every(step: int, start: int = 0) -> tuple[type[BaseModel], str]:
    """A model of one type in `step`, and an answer."""
    types = {name: TYPES[name] for name in list(TYPES)[start::step]}
    annotations = {name: kind for name, (kind, _) in types.items()}
    model = type(
        "Everything",
        (BaseModel,),
        {"__annotations__": annotations, "model_config": ConfigDict(extra="forbid")},
    )
    text = ",".join(f'"{name}":{value}' for name, (_, value) in types.items())
    return model, f"{{{text}}}".replace("é", "e")


def test_an_answer_of_each_type_is_parsed() -> None:
    answers = [f'{{"value":{value}}}'.replace("é", "e") for _, value in TYPES.values()]
    with script_client(chat_template(), *answers) as client:
        for seed, name in enumerate(TYPES):
            model = _model(name)
            done = client.chat.completions.parse(
                model="tiny", messages=HELLO, response_format=model, seed=seed, temperature=0
            )
            message = done.choices[0].message
            assert message.parsed == model.model_validate_json(answers[seed]), name
            assert message.refusal is None


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_of_all_types_is_parsed_whole_and_streamed(streamed: bool) -> None:
    model, text = _every(1)
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 0, "temperature": 0}
    with script_client(chat_template(), text) as client:
        if streamed:
            with client.chat.completions.stream(response_format=model, **asked) as stream:
                kinds = {event.type for event in stream}
                done = stream.get_final_completion()
            assert {"chunk", "content.delta", "content.done"} <= kinds
        else:
            done = client.chat.completions.parse(response_format=model, **asked)
    assert done.choices[0].message.parsed == model.model_validate_json(text)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_arguments_of_a_call_are_parsed_into_the_tools_model(streamed: bool) -> None:
    offered = [_every(4, start) for start in range(4)]
    said = [
        f'<tool_call>\n{{"name": "Everything", "arguments": {text}}}\n</tool_call>' for _, text in offered
    ]
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tool_choice": "required", "temperature": 0}
    with script_client(chat_template(ToolFormat.HERMES), *said) as client:
        for seed, (model, text) in enumerate(offered):
            tools = [openai.pydantic_function_tool(model)]
            if streamed:
                with client.chat.completions.stream(tools=tools, seed=seed, **asked) as stream:
                    kinds = {event.type for event in stream}
                    done = stream.get_final_completion()
                assert "tool_calls.function.arguments.done" in kinds
            else:
                done = client.chat.completions.parse(tools=tools, seed=seed, **asked)
            (choice,) = done.choices
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls or []
            assert call.function.parsed_arguments == model.model_validate_json(text)
