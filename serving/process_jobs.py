"""The tasks of the processes of a server, which each is told on its standard input, and how it reports.

A process reads one line of JSON. Its input then stays open as long as whoever started it lives: a process
that reads the end of its input ends.
"""

import os
import sys
import threading
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from albireo_jax.core.config import EngineConfig
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat

READY = "albireo: the engine is ready: "
"""Begins the line that an engine process writes to standard output when it takes requests; sizes end it."""

_ORPHANED = 1

_Job = TypeVar("_Job")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """Run the engine of `config` for front ends that connect to `address`."""

    config: EngineConfig
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """The options of the HTTP app, as `create_app` takes them, and the name that clients ask for."""

    served_name: str
    api_key: str | None
    origins: tuple[str, ...]
    tool_call_parser: ToolFormat | None
    reasoning_parser: ReasoningFormat | None
    stream_interval: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndJob:
    """Serve the engine at `address` over HTTP to who connects to a listening socket that was inherited."""

    config: EngineConfig
    address: str
    socket_fd: int
    http: HttpOptions


def write_job(job: EngineJob | FrontEndJob) -> bytes:
    """The line that tells a process its job."""
    return msgspec.json.encode(job) + b"\n"


def read_job(kind: type[_Job]) -> _Job:
    """The job of this process, which ends from now on with whoever gave it."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    threading.Thread(target=_end_with_giver, name="albireo-orphaned", daemon=True).start()
    return job


def _end_with_giver() -> None:
    while os.read(sys.stdin.fileno(), 2**12):
        continue
    os._exit(_ORPHANED)
