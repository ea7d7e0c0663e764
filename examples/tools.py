"""Let a model call a function: it asks for the call, this program makes it, and the model gets the result.

    albireo serve /models/Qwen2.5-7B-Instruct
    python examples/tools.py

The chat template of a model tells how it writes its calls. Where it does not, choose a format with
`albireo serve MODEL --tool-call-parser hermes`.
"""

import argparse
import json
from collections.abc import Sequence

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

ADD: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two integers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},  # small models like to write spaces
        },
    },
}


def add(a: int, b: int) -> int:
    """The function that the model may call."""
    return a + b


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, call, answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--prompt", default="What is 17 plus 25?")
    options = parser.parse_args(arguments)

    conversation: list[ChatCompletionMessageParam] = [{"role": "user", "content": options.prompt}]
    with OpenAI(base_url=options.url, api_key="none") as client:
        model = client.models.list().data[0].id
        # `required` makes the answer a call whose arguments follow the schema; `auto` leaves it to the model.
        asked = client.chat.completions.create(
            model=model, messages=conversation, tools=[ADD], tool_choice="required", max_tokens=100, seed=1
        )
        message = asked.choices[0].message
        conversation.append(message.model_dump(exclude_none=True))  # type: ignore[arg-type]
        for call in message.tool_calls or []:
            assert call.type == "function"
            result = add(**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) = {result}")
            conversation.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        reply = client.chat.completions.create(model=model, messages=conversation, max_tokens=60, seed=1)
        print(reply.choices[0].message.content)


if __name__ == "__main__":
    main()
