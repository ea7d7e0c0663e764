"""The worker's end of a benchmark: questions come in and answers go out, one JSON object a line.

Needs only Python's own library, so that it runs in the virtual environment of any engine.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class Channel:
    """Standard input and output, the latter kept for answers: what an engine prints goes to stderr.

    Make it before an engine is imported, so that its threads and processes inherit the detour.
    """

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, hello: dict, answer: Callable[[dict], dict]) -> None:
        """Say `hello`, then answer each question until standard input ends."""
        self._send(hello)
        for line in sys.stdin:
            self._send(answer(json.loads(line)))

    def _send(self, content: dict) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()


def generation_arguments() -> argparse.Namespace:
    """The command line that all workers that generate text share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    return parser.parse_args()


def random_model_arguments(doc: str | None) -> argparse.ArgumentParser:
    """What workers share that make their model of random weights; `doc` describes the worker."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--config", type=Path, required=True, help="a Hugging Face config.json")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--max-model-len", type=int, required=True, help="tokens of the longest request")
    parser.add_argument("--max-requests", type=int, required=True, help="that run at the same time")
    parser.add_argument(
        "--max-tokens", type=int, required=True, help="of all requests at once, at their ends"
    )
    return parser


def installed(*packages: str) -> dict[str, str]:
    """Python's version and those of the packages that are installed here."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
