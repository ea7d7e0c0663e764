"""A flag for each parameter by which a token is chosen, made from the fields of `TokenSampling`."""

from dataclasses import asdict, dataclass, make_dataclass
from typing import Annotated, Any

import typer

from albireo_jax.cli.options import with_flags
from albireo_jax.core.token_sampling import PARAMETERS, SamplingParameter, WordKind


@dataclass(frozen=True)
class SamplingFlags:
    """The values of the flags; None where a flag is not given. See `with_sampling_flags`."""

    def given(self) -> dict[str, Any]:
        """The parameters that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _annotation(parameter: SamplingParameter) -> Any:
    is_float = parameter.kind is WordKind.FLOAT
    option = typer.Option(
        metavar="X" if is_float else "N",
        help=f"{parameter.help} Default: {parameter.unset}.",
        show_default=False,
    )
    return Annotated[(float if is_float else int) | None, option]


_OneFlagEach = make_dataclass(
    "_OneFlagEach",
    [(name, _annotation(parameter), None) for name, parameter in PARAMETERS.items()],
    bases=(SamplingFlags,),
    frozen=True,
)

with_sampling_flags = with_flags(_OneFlagEach, argument="sampling")
"""Gives a command a flag for each parameter; it takes them as the argument `sampling`, a `SamplingFlags`."""
