"""A front-end process of `albireo serve`: HTTP, templates and text, without JAX.

It answers that the model is loading until the engine's process welcomes it, and again while an engine that
ended is being replaced.
"""

import asyncio
import logging
import socket
import sys
from dataclasses import dataclass

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_files import find_model
from albireo_jax.core.sampling_defaults import served_defaults
from albireo_jax.engine.engine_client import EngineFigures
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.interpreter import settle_interpreter
from albireo_jax.engine.remote_engine import RemoteEngine
from albireo_jax.engine.request_metrics import MetricsSnapshot, add_metrics
from albireo_jax.serving.app import create_app
from albireo_jax.serving.loading import LOADING, answers_loading
from albireo_jax.serving.process_jobs import FrontEndJob, read_job
from albireo_jax.serving.server import serve
from albireo_jax.text.tokenizer import Tokenizer

_ENGINE_ERROR = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotelyServed:
    """An engine in another process as the HTTP app needs it."""

    served_name: str
    limits: EngineLimits
    tokenizer: Tokenizer
    service: RemoteEngine
    frontend: Frontend

    def request_totals(self) -> MetricsSnapshot:
        """Totals of the requests of all front ends: this one's now, the others' a moment ago."""
        own, others = self.frontend.metrics.snapshot(), self.service.others
        return own if others is None else add_metrics([own, others])

    async def figures(self) -> EngineFigures:
        """The engine's measurements; raises EngineDeadError if it does not run."""
        return await asyncio.wrap_future(self.service.figures())


def run(job: FrontEndJob) -> None:
    """Serve until a signal says stop; raises EngineDeadError if this process must be replaced."""
    with socket.socket(fileno=job.socket_fd) as bound:
        engine = RemoteEngine(job.address)
        with answers_loading(bound, lambda: f"{LOADING}: {engine.loading.text}"):
            tokenizer = Tokenizer.from_files(find_model(job.config.model))
            engine.wait_welcome()
        frontend = Frontend(
            engine,
            tokenizer,
            limits=engine.limits,
            eos_token_ids=engine.eos_token_ids,
            defaults=served_defaults(job.config),
        )
        engine.share_metrics(frontend.metrics.snapshot)
        served = RemotelyServed(
            served_name=job.http.served_name,
            limits=engine.limits,
            tokenizer=tokenizer,
            service=engine,
            frontend=frontend,
        )
        app = create_app(
            served,
            api_key=job.http.api_key,
            allow_origins=job.http.origins,
            tool_call_parser=job.http.tool_call_parser,
            reasoning_parser=job.http.reasoning_parser,
            stream_interval=job.http.stream_interval,
        )
        settle_interpreter()
        try:
            serve(app, bound)
        finally:
            frontend.close()


def main() -> None:
    """Do the job that standard input tells."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        run(read_job(FrontEndJob))
    except EngineDeadError as error:
        sys.stderr.write(f"albireo: a front end ends: {error}\n")
        raise SystemExit(_ENGINE_ERROR) from error


if __name__ == "__main__":
    main()
