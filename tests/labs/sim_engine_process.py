"""An engine process of `albireo serve` whose device is simulated; it dies when a file says so.

It is told its job as the real one is. A step takes some milliseconds. When the model's folder holds a file
`panic`, the next step raises; when it holds a file `refuse`, the process ends before it is ready.
"""

import os
import sys
import time
from pathlib import Path

from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.engine.engine_server import EngineServer
from albireo_jax.engine.service import EngineService, ServiceState
from albireo_jax.serving.process_jobs import READY, EngineJob, read_job
from tests.labs.engine_lab import LIMITS, sim_loop, tiny_compiler, tiny_tokenizer
from tests.labs.service_lab import no_figures

_STEP_S = 0.005


class _Panic(BaseException):
    """A panic of an extension module as Python sees it: a BaseException that is no Exception."""


class _Slow:
    def __init__(self, inner: Executor, folder: Path) -> None:
        self._inner = inner
        self._folder = folder

    def dispatch(self, plan: StepPlan) -> StepHandle:
        time.sleep(_STEP_S)
        if (self._folder / "panic").exists():
            raise _Panic("secret of another caller")
        return self._inner.dispatch(plan)


def main() -> None:
    job = read_job(EngineJob)
    folder = Path(job.config.model)
    if (folder / "refuse").exists():
        raise SystemExit(2)
    server = EngineServer(job.address)
    server.tell_loading("compiling steps", done=1, total=2)
    service = EngineService(
        sim_loop(wrap=lambda inner: _Slow(inner, folder)), LIMITS, compiler=tiny_compiler(LIMITS)
    )
    server.serve(service, eos_token_ids=tiny_tokenizer().eos_token_ids, figures=no_figures)
    (folder / "engine.pid").write_text(str(os.getpid()))
    sys.stdout.write(f"{READY}simulated\n")
    sys.stdout.flush()
    while service.state is not ServiceState.DEAD:
        time.sleep(0.01)
    server.close()
    os._exit(1)


if __name__ == "__main__":
    main()
