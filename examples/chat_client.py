"""Chat with a server: the answers are streamed, and each turn sends the whole conversation.

albireo serve smollm2
python examples/chat_client.py                               asks for lines on the terminal
python examples/chat_client.py --prompt "Name three colours."
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def answer(client: OpenAI, model: str, conversation: list[ChatCompletionMessageParam]) -> str:
    """The next message of the assistant, printed piece by piece."""
    stream = client.chat.completions.create(
        model=model,
        messages=conversation,
        max_tokens=200,
        stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    for chunk in stream:
        if chunk.choices:
            piece = chunk.choices[0].delta.content or ""
            print(piece, end="", flush=True)
            text += piece
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            # The server finds the earlier turns in its cache and does not compute them again.
            cached = chunk.usage.prompt_tokens_details.cached_tokens
            print(f"\n  [{chunk.usage.prompt_tokens} prompt tokens, {cached} of them cached]")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer each prompt in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--prompt", action="append", help="may be repeated; by default the terminal's lines")
    options = parser.parse_args(arguments)

    conversation: list[ChatCompletionMessageParam] = []
    prompts: Iterable[str] = options.prompt or map(str.strip, sys.stdin)
    with OpenAI(base_url=options.url, api_key="none") as client:
        model = client.models.list().data[0].id
        for prompt in prompts:
            conversation.append({"role": "user", "content": prompt})
            text = answer(client, model, conversation)
            conversation.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
