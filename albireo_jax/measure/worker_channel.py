"""The worker's end of a measurement in a process of its own: one JSON object a line comes in, one goes out.

::

    measuring process                       worker (of any engine, in any environment with NumPy)
      WorkerProcess(...)       ◀── hello ──   WorkerChannel(), then imports its engine and loads it
      send(question)           ── line ──▶    answers
      receive()                ◀── line ──
      close()                                 ends with its input, or by force

Everything else that a worker prints goes to its standard error, which is its log.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class WorkerChannel:
    """Standard input and output, the latter kept for answers.

    Make it before an engine is imported, so that the threads and processes of the engine inherit the detour.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def questions(self) -> Iterator[dict[str, Any]]:
        """The lines that come in, until standard input ends."""
        for line in sys.stdin:
            yield json.loads(line)

    def send(self, content: Mapping[str, Any]) -> None:
        """Write one line."""
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()

    def serve(self, hello: Mapping[str, Any], answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Say `hello`, then answer each question until standard input ends."""
        self.send(hello)
        for question in self.questions():
            self.send(answer(question))
