"""A model's own sampling defaults: what its generation_config.json says of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albireo_jax.core.config import EngineConfig, GenerationConfig
from albireo_jax.core.errors import ModelError
from albireo_jax.core.json_fields import read_json
from albireo_jax.core.model_files import find_model
from albireo_jax.core.token_sampling import PARAMETERS
from albireo_jax.core.types import SamplingParams

_FILE = "generation_config.json"


_FILE_NAMES = {
    **{name: name for name, parameter in PARAMETERS.items() if parameter.is_models},
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}
"""Our parameters that a model may have a default for, and their names in its file."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling parameters by name for callers who give none; others are as in `SamplingParams`.

    Raises ValueError for values that no sampler takes.
    """

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse what a caller could not give either."""
        self.params()

    @property
    def max_tokens(self) -> int | None:
        """The model's own length of an answer; None if it has none."""
        return self.values.get("max_tokens")

    def given(self) -> dict[str, Any]:
        """The parameters that the model has a value for."""
        return dict(self.values)

    def params(self) -> SamplingParams:
        """Sampling parameters of a caller who gives none."""
        return SamplingParams(**self.given())


NO_DEFAULTS = SamplingDefaults()
"""Leaves every parameter to ours."""


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """The defaults in a model's folder; none without the file, or where `folder` is a file itself.

    `do_sample` is not looked at, as in other servers. Raises ModelError for a file or a value that is broken.
    """
    path = folder / _FILE
    if not path.is_file():
        return NO_DEFAULTS
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} must hold an object, got {content!r:.50}")
    named = {name: content.get(name_there) for name, name_there in _FILE_NAMES.items()}
    try:
        return SamplingDefaults({name: value for name, value in named.items() if value is not None})
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error


def served_defaults(config: EngineConfig) -> SamplingDefaults:
    """The defaults of the model that `config` names, unless it leaves them aside. Raises as above."""
    if config.generation_config is not GenerationConfig.AUTO:
        return NO_DEFAULTS
    return read_sampling_defaults(find_model(config.model).path)
