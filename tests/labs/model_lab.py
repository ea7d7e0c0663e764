"""A real model's engine for the tests that need one: a 260,032-parameter Llama."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from albireo_jax.core.config import EngineConfig, SchedulerConfig
from albireo_jax.launch import Engine, launch


@contextmanager
def stories(data_dir: Path, *, max_rows: int, max_step_tokens: int) -> Generator[Engine, None, None]:
    """A running engine of stories260k."""
    config = EngineConfig(
        model=str(data_dir / "models" / "stories260k"),
        scheduler=SchedulerConfig(max_rows=max_rows, max_step_tokens=max_step_tokens),
    )
    running = launch(config)
    try:
        yield running
    finally:
        running.close()
