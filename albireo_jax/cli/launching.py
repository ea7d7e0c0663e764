"""Launch an engine from the command line, its progress on the terminal."""

from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from albireo_jax.core.config import EngineConfig
from albireo_jax.core.model_files import find_model

if TYPE_CHECKING:
    from albireo_jax.launch import Engine


@contextmanager
def launched(config: EngineConfig, *, measure_sampling: bool = False) -> "Generator[Engine, None, None]":
    """A running engine, closed at the end; a bar on standard error counts the compiled steps.

    With `measure_sampling` its task table tells T4 from T3. Raises as `launch` does.
    """
    find_model(config.model)  # tells of a wrong name at once
    # Imported here, since JAX takes seconds to import and `albireo --help` should not wait for it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from albireo_jax.launch import launch

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(f"loading {config.model}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="compiling steps", completed=done, total=total)

        engine = launch(config, progress=show, measure_sampling=measure_sampling)
    with closing(engine):
        yield engine
