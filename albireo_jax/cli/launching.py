"""Launch an engine from the command line, its progress on the terminal."""

from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import typer

from albireo_jax.core.config import EngineConfig
from albireo_jax.core.model_files import find_model

if TYPE_CHECKING:
    from albireo_jax.launch import Engine, Prepared

_LINES = 10
"""Lines that tell of the progress where there is no terminal."""


@contextmanager
def launched(config: EngineConfig, *, measure_sampling: bool = False) -> "Generator[Engine, None, None]":
    """A running engine, closed at the end; a bar on standard error counts the compiled steps.

    With `measure_sampling` its task table tells T4 from T3. Raises as `launch` does.
    """
    with shown_progress(config) as show:
        from albireo_jax.launch import launch

        engine = launch(config, progress=show, measure_sampling=measure_sampling)
    with closing(engine):
        yield engine


def prepared(config: EngineConfig) -> "Prepared":
    """An engine that is compiled but not started, with the same bar; its sampling was measured.

    Raises as `prepare` does.
    """
    with shown_progress(config) as show:
        from albireo_jax.launch import prepare

        return prepare(config, progress=show, measure_sampling=True)


@contextmanager
def needs_extra(extra: str) -> Generator[None, None, None]:
    """For imports of packages that come with an extra: ValueError says how to install what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"{package} is missing: pip install 'albireo-jax[{extra}]'") from error


@contextmanager
def shown_progress(config: EngineConfig) -> Generator[Callable[[int, int], None], None, None]:
    """A bar on standard error; gives what to call with the steps that are compiled and those in all.

    Without a terminal, lines: the beginning, then about every tenth of the steps.
    """
    find_model(config.model)  # tells of a wrong name at once
    # Imported here, since JAX takes seconds to import and `albireo --help` should not wait for it.
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines(config)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(f"loading {config.model}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="compiling steps", completed=done, total=total)

        yield show


def _progress_lines(config: EngineConfig) -> Callable[[int, int], None]:
    """A progress callback that writes lines of text, for an output that can show no bar."""
    typer.echo(f"loading {config.model}", err=True)

    def show(done: int, total: int) -> None:
        if done * _LINES // total > (done - 1) * _LINES // total:
            typer.echo(f"compiling steps: {done} of {total}", err=True)

    return show
