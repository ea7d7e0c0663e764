"""The engine process of `albireo serve`: JAX and the engine loop, for front ends in other processes."""

import os
import signal
import sys
import threading
from types import FrameType

from albireo_jax.cli.launching import shown_progress
from albireo_jax.core.errors import AlbireoError, EngineDeadError
from albireo_jax.engine.engine_server import EngineServer
from albireo_jax.engine.interpreter import settle_interpreter
from albireo_jax.engine.service import ServiceState
from albireo_jax.serving.process_jobs import READY, EngineJob, read_job

_CALLER_ERROR, _ENGINE_ERROR = 2, 1
_POLL_S = 0.1


def run(job: EngineJob) -> None:
    """Load the model and serve until SIGTERM; raises EngineDeadError when the engine's thread ends."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stopped.set()

    server = EngineServer(job.address)
    try:
        with shown_progress(job.config) as show:

            def progress(done: int, total: int) -> None:
                server.tell_loading("compiling steps", done=done, total=total)
                show(done, total)

            server.tell_loading("loading the model")
            from albireo_jax.launch import prepare_service  # JAX takes seconds to import

            prepared = prepare_service(job.config, progress=progress, measure_sampling=True)
        service = prepared.service
        server.serve(service, eos_token_ids=prepared.eos_token_ids, figures=prepared.figures)
        settle_interpreter()
        signal.signal(signal.SIGTERM, stop)
        limits = service.limits
        sizes = f"{limits.num_pages} pages of {limits.page_size}"
        sys.stdout.write(f"{READY}sequences of up to {limits.max_sequence_len} tokens, {sizes}\n")
        sys.stdout.flush()
        while not stopped.wait(_POLL_S):
            if service.state is ServiceState.DEAD:
                service.check_running()
        service.stop()
    finally:
        server.close()


def main() -> None:
    """Do the job that standard input tells; code 2 for what the caller asked, 1 for what the engine did."""
    try:
        run(read_job(EngineJob))
    except EngineDeadError as error:
        _leave(error, _ENGINE_ERROR)
    except ValueError as error:
        _leave(error, _CALLER_ERROR)
    except AlbireoError as error:
        _leave(error, _ENGINE_ERROR)


def _leave(error: Exception, code: int) -> None:
    """End the process without waiting for threads, which may hang with the device."""
    sys.stderr.write(f"albireo: {error}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
