"""A constraint that no longer compiles when its request is taken is told as it is at the door."""

import json
from typing import Any

import httpx
import pytest

from albireo_jax.core.errors import OverloadedError, RefusedRequestError
from albireo_jax.core.types import SamplingParams, StructuredOutput, StructureKind
from albireo_jax.engine.constraint_compiler import CompiledGrammar
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import LIMITS, lab, tiny_compiler
from tests.labs.http_lab import served

CHOICE = StructuredOutput(kind=StructureKind.CHOICE, choices=("yes", "no"))
WRONG = ValueError("choices: out of fashion")
BUSY = OverloadedError("the server is busy: too many grammars")
BODY: dict[str, Any] = {"prompt": "Well?", "max_tokens": 5, "guided_choice": ["yes", "no"]}


class _Once:
    """Compiles a grammar when it is first asked, and fails from then on."""

    def __init__(self, error: Exception) -> None:
        self._compiler = tiny_compiler(LIMITS)
        self._error = error
        self._compiled = set[StructuredOutput]()

    def find(self, structured: StructuredOutput) -> None:
        pass

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        if structured in self._compiled:
            raise self._error
        assert self._compiler is not None
        self._compiled.add(structured)
        return self._compiler.compile(structured)


@pytest.mark.parametrize(("error", "kind"), [(WRONG, RefusedRequestError), (BUSY, OverloadedError)])
def test_python_callers_get_the_error_that_the_door_raises(error: Exception, kind: type[Exception]) -> None:
    with lab(compiler=_Once(error)) as engine:
        with pytest.raises(kind, match=str(error)):
            engine.frontend.generate(["Well?"], SamplingParams(structured=CHOICE, n=2))
        assert engine.service.drain(60)
        assert engine.frontend.num_readers == 0
        assert len(engine.frontend.generate(["Well?"], SamplingParams())) == 1


@pytest.mark.parametrize(("error", "status"), [(WRONG, 400), (BUSY, 429)])
def test_clients_get_the_status_or_an_error_event(error: Exception, status: int) -> None:
    for stream in (False, True):
        with lab(compiler=_Once(error)) as engine, served(create_app(engine)) as url:
            answer = httpx.post(f"{url}/v1/completions", json=BODY | {"stream": stream}, timeout=60)
            if not stream:
                assert answer.status_code == status
                assert answer.json()["error"]["message"] == str(error)
                continue
            *events, done = answer.text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]"
            assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == str(error)
