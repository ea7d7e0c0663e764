"""The running engine as the HTTP app needs it, and the dependencies by which routes get at it."""

from typing import Annotated, Protocol

from fastapi import Depends, Request

from albireo_jax.core.limits import EngineLimits
from albireo_jax.engine.engine_client import EngineClient, EngineFigures
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.request_metrics import MetricsSnapshot
from albireo_jax.text.answers.answer_formats import AnswerFormat
from albireo_jax.text.tokenizer import Tokenizer


class ServedEngine(Protocol):
    """A running engine under the name that clients ask for; `launch.Engine` is one."""

    @property
    def served_name(self) -> str:
        """Name of the model."""
        ...

    @property
    def limits(self) -> EngineLimits:
        """The engine's limits."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        ...

    @property
    def frontend(self) -> Frontend:
        """The frontend, which opens streams."""
        ...

    @property
    def service(self) -> EngineClient:
        """The engine, for its state and statistics."""
        ...

    def request_totals(self) -> MetricsSnapshot:
        """Totals of the requests of all front ends."""
        ...

    async def figures(self) -> EngineFigures:
        """The engine's measurements; raises EngineDeadError if it runs elsewhere and does not answer."""
        ...


async def _format_of(request: Request) -> AnswerFormat:
    return request.app.state.answer_format


async def _engine_of(request: Request) -> ServedEngine:
    return request.app.state.engine


EngineDependency = Annotated[ServedEngine, Depends(_engine_of)]
"""Parameter of a route: the engine that the app was created with."""

FormatDependency = Annotated[AnswerFormat, Depends(_format_of)]
"""Parameter of a route: how the model writes its answers."""
