"""A request's constraint is compiled beside the engine thread, and its faults end that request alone."""

from dataclasses import replace

import numpy as np
import pytest

from albireo_jax.core.errors import ConstraintError, OverloadedError, Refusal
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import FinishReason
from tests.labs.engine_lab import LIMITS
from tests.labs.service_lab import (
    NamedConstraints,
    Start,
    Transports,
    bound_by,
    plain_request,
)


class _Panic(BaseException):
    """A panic of an extension module as Python sees it: a BaseException that is no Exception."""


class _Mute:
    """A constraint that fails at once, or allows nothing."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    def mask(self) -> Int32s:
        if self._fails:
            raise ConstraintError("too complex")
        return np.zeros(-(-LIMITS.vocab_size // 32), np.int32)

    def advance(self, token_id: int) -> None:
        raise AssertionError(f"token {token_id} was not allowed")


@pytest.mark.parametrize(("fails", "reason"), [(True, FinishReason.ERROR), (False, FinishReason.STOP)])
def test_a_request_that_ends_as_it_is_added_is_answered(
    fails: bool, reason: FinishReason, start: Start
) -> None:
    service, collector = start(NamedConstraints(mute=_Mute(fails=fails)))
    service.submit(replace(plain_request("mute"), structured=bound_by("mute")), plain_request("other"))
    collector.wait_for_end(2)
    service.stop()
    assert collector.ends() == {"mute": reason, "other": FinishReason.LENGTH}
    assert collector.tokens("mute") == []


class _Broken:
    """A constraint that raises when it is first asked, or when it takes in its first token."""

    def __init__(self, error: BaseException, *, in_mask: bool) -> None:
        self._error = error
        self._in_mask = in_mask

    def mask(self) -> Int32s:
        if self._in_mask:
            raise self._error
        return np.full(-(-LIMITS.vocab_size // 32), -1, np.int32)

    def advance(self, token_id: int) -> None:
        raise self._error


@pytest.mark.parametrize("in_mask", [True, False])
@pytest.mark.parametrize("kind", [ConstraintError, LookupError, MemoryError, BaseException])
def test_a_constraint_that_raises_anything_ends_its_request_alone(
    kind: type[BaseException], in_mask: bool, start: Start
) -> None:
    broken = _Broken(kind("a grammar of nobody else's concern"), in_mask=in_mask)
    service, collector = start(NamedConstraints(broken=broken))
    service.submit(replace(plain_request("broken"), structured=bound_by("broken")), plain_request("other"))
    collector.wait_for_end(2)
    service.stop()
    assert collector.ends() == {"broken": FinishReason.ERROR, "other": FinishReason.LENGTH}
    assert service.stats().pages_in_use == 0


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (ValueError("line 1: no such rule"), Refusal("line 1: no such rule")),
        (OverloadedError("the server is busy"), Refusal("the server is busy", is_overload=True)),
        (LookupError("a bug"), None),
        (_Panic("another"), None),
    ],
)
def test_a_constraint_that_does_not_compile_ends_its_request_with_the_reason(
    error: BaseException, refusal: Refusal | None, start: Start, transports: Transports
) -> None:
    service, collector = start(NamedConstraints(wrong=error))
    service.submit(replace(plain_request("wrong"), structured=bound_by("wrong")), plain_request("other"))
    collector.wait_for_end(2)
    assert service.drain(60)
    is_told = refusal is not None or not transports.is_remote
    kind, text = (type(error), str(error)) if is_told else (OverloadedError, "its log says why")
    with pytest.raises(kind, match=text):
        service.first_mask(bound_by("wrong")).result(60)
    service.stop()
    assert collector.ends() == {"wrong": FinishReason.ERROR, "other": FinishReason.LENGTH}
    assert [output.refusal for output in collector.outputs if output.request_id == "wrong"] == [refusal]
    assert collector.tokens("wrong") == []


def test_a_request_whose_constraint_is_being_compiled_delays_nobody_and_can_be_aborted(start: Start) -> None:
    compiler = NamedConstraints(slow=_Mute(fails=False))
    compiler.opened.clear()
    service, collector = start(compiler)
    service.submit(*(replace(plain_request(name), structured=bound_by("slow")) for name in ("kept", "left")))
    service.submit(plain_request("other"))
    collector.wait_for_end(1)
    service.abort("left")
    collector.wait_for_end(1)
    assert collector.ends() == {"other": FinishReason.LENGTH, "left": FinishReason.ABORT}
    compiler.opened.set()
    assert service.drain(60)
    assert collector.ends()["kept"] is FinishReason.STOP
    compiler.opened.clear()
    service.submit(replace(plain_request("last"), structured=bound_by("slow")))
    service.stop()
    compiler.opened.set()
    assert collector.ends()["last"] is FinishReason.ABORT


def test_without_a_compiler_constraints_are_refused(start: Start) -> None:
    service, collector = start()
    service.submit(replace(plain_request("bound"), structured=bound_by("any")))
    collector.wait_for_end(1)
    (output,) = collector.outputs
    assert output.refusal is not None
    assert "needs an end-of-sequence id" in output.refusal.message
    service.stop()
