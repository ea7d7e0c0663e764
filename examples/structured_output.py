"""Ask a server for answers of a given form: a JSON schema, a regular expression, a choice.

albireo serve smollm2
python examples/structured_output.py
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from openai import OpenAI

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # small models like to write spaces, and this forbids them
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask three questions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1")
    options = parser.parse_args(arguments)

    with OpenAI(base_url=options.url, api_key="none") as client:
        model = client.models.list().data[0].id

        def ask(question: str, **form: Any) -> str:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=100, seed=1, **form
            )
            return reply.choices[0].message.content or ""

        # OpenAI's way. The answer is JSON that the schema allows, unless max_tokens cuts it off.
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
        person = json.loads(ask("Describe a person as JSON.", response_format=schema))
        print("schema:", person["name"], "is", person["age"])

        # vLLM's way, through extra_body since OpenAI's client does not know the field.
        date = {"structured_outputs": {"regex": r"[12]\d{3}-[01]\d-[0-3]\d"}}
        print("regex: ", ask("When did people land on the moon?", extra_body=date))

        mood = {"structured_outputs": {"choice": ["positive", "negative"]}}
        print("choice:", ask("Is this a good or a bad review? 'I loved it.'", extra_body=mood))


if __name__ == "__main__":
    main()
