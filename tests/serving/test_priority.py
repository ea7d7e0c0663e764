"""The field `priority` orders the requests that wait, or is refused where the engine does not look at it."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from albireo_jax import LLM
from albireo_jax.core.checks import MAX_INT
from albireo_jax.core.config import SchedulingPolicy
from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.core.types import Request, SamplingParams
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import LIMITS, Lab, lab
from tests.labs.http_lab import in_process

COMPLETION = ("/v1/completions", {"prompt": "Once", "max_tokens": 2})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2})
BY_PRIORITY = {
    "limits": replace(LIMITS, takes_priority=True),
    "scheduling_policy": SchedulingPolicy.PRIORITY,
    "max_rows": 1,
}


def answers(engine: Lab, bodies: Sequence[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine)) as client:
            return [await client.post(path, json=body) for path, body in bodies]

    return asyncio.run(main())


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
def test_first_come_first_served_takes_no_priority_but_0(
    engine: Lab, path: str, body: dict[str, Any]
) -> None:
    refused, *taken = answers(engine, [(path, body | {"priority": value}) for value in (3, 0, None)])
    error = refused.json()["error"]
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert error["param"] == "priority"
    assert error["message"].startswith("priority 3 needs ")
    assert "--scheduling-policy priority" in error["message"]
    assert [answer.status_code for answer in taken] == [httpx.codes.OK] * 2


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
@pytest.mark.parametrize("priority", [MAX_INT + 1, -MAX_INT - 1, 1.5, "high", True])
def test_what_is_no_priority_is_refused(path: str, body: dict[str, Any], priority: object) -> None:
    with lab(**BY_PRIORITY) as engine:
        (refused,) = answers(engine, [(path, body | {"priority": priority})])
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert refused.json()["error"]["param"] == "priority"


class Gate:
    """An executor whose first step waits until all requests are submitted, and which notes who starts."""

    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests
        self.entered, self.opened = threading.Event(), threading.Event()
        self.priority_of: dict[str, int] = {}
        self.started: list[int] = []

    def wrap(self, inner: Executor) -> Executor:
        self.inner = inner
        return self

    def watch(self, engine: Lab) -> None:
        submit = engine.service.submit

        def note(*requests: Request) -> None:
            submit(*requests)
            self.priority_of |= {request.request_id: request.priority for request in requests}
            if len(self.priority_of) == self.num_requests:
                self.opened.set()

        engine.service.submit = note

    def dispatch(self, plan: StepPlan) -> StepHandle:
        self.entered.set()
        assert self.opened.wait(30), "some request never came"
        new_slots = {params.slot for params in plan.new_slots}
        for request_id, slot in zip(plan.request_ids, plan.slots.tolist(), strict=True):
            if slot in new_slots:
                self.started.append(self.priority_of[request_id])
        return self.inner.dispatch(plan)


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
def test_the_lowest_priority_is_served_first(path: str, body: dict[str, Any]) -> None:
    waiting = [4, 0, -2, 4, MAX_INT, 1]
    gate = Gate(1 + len(waiting))

    async def main(engine: Lab) -> None:
        async with in_process(create_app(engine)) as client:
            first = asyncio.create_task(client.post(path, json=body | {"priority": 9}))
            assert await asyncio.to_thread(gate.entered.wait, 30)
            others = [client.post(path, json=body | {"priority": each}) for each in waiting]
            for answer in await asyncio.gather(first, *others):
                assert answer.status_code == httpx.codes.OK, answer.text

    with lab(**BY_PRIORITY, wrap=gate.wrap) as engine:
        gate.watch(engine)
        asyncio.run(main(engine))
    assert gate.started == [9, *sorted(waiting)]


def test_each_prompt_of_a_call_may_have_a_priority_of_its_own() -> None:
    gate = Gate(4)
    params = SamplingParams(max_tokens=2, temperature=0)
    with lab(**BY_PRIORITY, wrap=gate.wrap) as engine:
        gate.watch(engine)
        prompts = ["a", "b", "c", "d"]
        ordered = engine.frontend.generate(prompts, params, priority=[3, 0, 2, -1])
        assert gate.started == [-1, 0, 2, 3]
        assert [each.text for each in ordered] == [
            each.text for each in engine.frontend.generate(prompts, params)
        ]
        with pytest.raises(ValueError, match="4 prompts but 3 priorities"):
            engine.frontend.generate(prompts, params, priority=[1, 2, 3])


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (None, [0, 0, 0]),
        (-2, [-2, -2, -2]),
        ([3, 0, 2], [0, 2, 3]),
        (np.array([3, 0, 2]), [0, 2, 3]),
    ],
)
@pytest.mark.parametrize("call", ["generate", "chat"])
def test_the_python_api_takes_one_priority_for_all_prompts_or_one_for_each(
    call: str, priority: Any, expected: list[int]
) -> None:
    gate = Gate(3)
    params = SamplingParams(max_tokens=2, temperature=0)
    given = iter(priority) if call == "chat" and isinstance(priority, list) else priority
    with lab(**BY_PRIORITY, wrap=gate.wrap) as engine:
        gate.watch(engine)
        llm = object.__new__(LLM)
        llm.engine = engine  # type: ignore[assignment]
        if call == "generate":
            made = llm.generate(["a", "b", "c"], params, priority=given)
        else:
            made = llm.chat([CHAT[1]["messages"]] * 3, params, priority=given)
    assert len(made) == 3
    assert gate.started == expected


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ("high", "priority must be an integer, got 'high'"),
        (1.5, "priority must be an integer, got 1.5"),
        (True, "priority must be an integer, got True"),
        ([1, 2], "1 prompts but 2 priorities"),
        ([None], "priority must be an integer, got None"),
        (MAX_INT + 1, "priority must be between"),
        (1, "priority 1 needs an engine whose scheduling policy is priority"),
    ],
)
def test_the_python_api_refuses_what_is_no_priority(engine: Lab, priority: Any, message: str) -> None:
    llm = object.__new__(LLM)
    llm.engine = engine  # type: ignore[assignment]
    for call in (llm.generate, llm.chat, llm.stream):
        with pytest.raises(ValueError, match=message):
            call("a", SamplingParams(max_tokens=2), priority=priority)
