"""A server whose engine panics when its standard input is closed; prints its URL."""

import sys
import threading

from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.serving.app import create_app
from albireo_jax.serving.server import address_of, bind, serve
from tests.labs.engine_lab import lab

_panics = threading.Event()


class _Panic(BaseException):
    """A panic of an extension module as Python sees it: a BaseException that is no Exception."""


class _Panicking:
    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    def dispatch(self, plan: StepPlan) -> StepHandle:
        if _panics.wait(0.002):
            raise _Panic("secret of another caller")
        return self._inner.dispatch(plan)


def _panic_at_the_end_of_input() -> None:
    sys.stdin.read()
    _panics.set()


if __name__ == "__main__":
    threading.Thread(target=_panic_at_the_end_of_input, daemon=True).start()
    with lab(wrap=_Panicking) as engine, bind("127.0.0.1", 0) as bound:
        sys.stdout.write(f"{address_of(bound)}\n")
        sys.stdout.flush()
        serve(create_app(engine), bound)
