"""The running engine as the HTTP app needs it, and the dependencies by which routes get at it."""

from typing import Annotated, Protocol

from fastapi import Depends, Request

from albireo_jax.core.limits import EngineLimits
from albireo_jax.engine.energy import Meter
from albireo_jax.engine.frontend import Frontend
from albireo_jax.engine.service import EngineService
from albireo_jax.engine.timeline import Timeline
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
    def service(self) -> EngineService:
        """The engine thread, for its state and figures."""
        ...

    @property
    def timeline(self) -> Timeline:
        """The timeline of the engine's steps."""
        ...

    @property
    def energy(self) -> Meter:
        """The meter of the devices' energy."""
        ...


async def _format_of(request: Request) -> AnswerFormat:
    return request.app.state.answer_format


async def _engine_of(request: Request) -> ServedEngine:
    return request.app.state.engine


EngineDependency = Annotated[ServedEngine, Depends(_engine_of)]
"""Parameter of a route: the engine that the app was created with."""

FormatDependency = Annotated[AnswerFormat, Depends(_format_of)]
"""Parameter of a route: how the model writes its answers."""
