"""The processes of `albireo serve` for one model."""

import socket
import sys
from tempfile import TemporaryDirectory

import typer

from albireo_jax.core.config import EngineConfig
from albireo_jax.serving.process_jobs import EngineJob, FrontEndJob, HttpOptions
from albireo_jax.serving.server import address_of
from albireo_jax.serving.supervisor import ServerPlan, supervise


def run_server(
    config: EngineConfig, http: HttpOptions, *, bound: socket.socket, num_front_ends: int, restarts: int
) -> None:
    """Serve at a listening socket until a signal; raises as `supervise` does."""
    with TemporaryDirectory(prefix="albireo-") as folder:
        address = f"ipc://{folder}/engine"
        plan = ServerPlan(
            engine_command=(sys.executable, "-m", "albireo_jax.cli.engine_process"),
            engine_job=EngineJob(config=config, address=address),
            front_end_command=(sys.executable, "-m", "albireo_jax.serving.front_end"),
            front_end_job=FrontEndJob(config=config, address=address, socket_fd=bound.fileno(), http=http),
            num_front_ends=num_front_ends,
            restarts=restarts,
        )
        url = address_of(bound)
        supervise(
            plan, ready=lambda sizes: typer.echo(f"serving {http.served_name} at {url}: {sizes}", err=True)
        )
