"""The command line that the workers of all engines share, and the form of their answers.

Needs NumPy besides Python's own library, so that it runs in the virtual environment of any engine.
"""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

from albireo_jax.measure.records import versions


def worker_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of a worker that generates; `doc` describes it.

    A question has `prompts` and, for each, its `max_tokens`; all are handed over at once, decoded greedily,
    and none ends before its length.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--random", action="store_true", help="draw the weights; the folder has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-model-len", type=int, required=True, help="tokens of the longest request")
    parser.add_argument("--max-requests", type=int, default=0, help="that run at the same time")
    parser.add_argument("--max-tokens", type=int, default=0, help="of all requests at once, at their ends")
    return parser


def hello(*packages: str) -> dict[str, dict[str, str]]:
    """A worker's first line: Python's version and those of the packages that are installed."""
    return {"versions": {"python": platform.python_version(), **versions(packages)}}


def generated(seconds: float, token_ids: Sequence[Sequence[int]]) -> dict[str, object]:
    """A worker's answer."""
    return {"seconds": seconds, "token_ids": token_ids, "tokens": sum(map(len, token_ids))}
