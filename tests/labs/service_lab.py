"""Requests, collectors and constraints by name, for tests of the service."""

import threading
from queue import SimpleQueue

from albireo_jax.core.plan import Int32s, TokenConstraint
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import FinishReason, Request, RequestOutput, StructuredOutput, StructureKind

BOUND_S = 30.0


def plain_request(request_id: str, *, max_tokens: int = 8, prompt_len: int = 5) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple((len(request_id) * 7 + i) % 90 for i in range(prompt_len)),
        max_tokens=max_tokens,
        sampling=TokenSampling(temperature=1.0, seed=sum(map(ord, request_id))),
    )


class Collector:
    """Keeps all outputs; `wait_for_end` blocks until a number of requests have ended."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._ended: SimpleQueue[str] = SimpleQueue()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self.outputs += outputs
        for output in outputs:
            if output.finish_reason is not None:
                self._ended.put(output.request_id)

    def wait_for_end(self, count: int) -> None:
        for _ in range(count):
            self._ended.get(timeout=60)

    def ends(self) -> dict[str, FinishReason]:
        ended = [output for output in self.outputs if output.finish_reason is not None]
        assert len({output.request_id for output in ended}) == len(ended), "a request ended twice"
        return {output.request_id: output.finish_reason for output in ended if output.finish_reason}

    def tokens(self, request_id: str) -> list[int]:
        return [
            output.token_id
            for output in self.outputs
            if output.request_id == request_id and output.token_id is not None
        ]


def bound_by(name: str) -> StructuredOutput:
    """The specification of the constraint of a name."""
    return StructuredOutput(kind=StructureKind.GRAMMAR, text=name)


class NamedConstraints:
    """A compiler that gives constraints, or raises errors, by name; it begins when it is `opened`."""

    def __init__(self, **constraints: TokenConstraint | BaseException) -> None:
        self._constraints = constraints
        self.opened = threading.Event()
        self.opened.set()

    def find(self, structured: StructuredOutput) -> None:
        """Nothing is kept."""

    def compile(self, structured: StructuredOutput) -> "_Named":
        assert self.opened.wait(BOUND_S)
        made = self._constraints[structured.text]
        if isinstance(made, BaseException):
            raise made
        return _Named(made)


class _Named:
    def __init__(self, constraint: TokenConstraint) -> None:
        self._constraint = constraint

    def constraint(self, *, ignore_eos: bool = False) -> TokenConstraint:
        return self._constraint

    def first_mask(self) -> Int32s:
        return self._constraint.mask()
