"""A model's own sampling defaults: what its generation_config.json says of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from albireo_jax.core.errors import ModelError
from albireo_jax.core.json_fields import read_json
from albireo_jax.core.types import SamplingParams

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Sampling parameters for callers who give none; None leaves ours.

    Raises ValueError for values that no sampler takes.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what a caller could not give either."""
        SamplingParams(**self.given())

    def given(self) -> dict[str, Any]:
        """The parameters that the model has a value for."""
        return {name: value for name, value in asdict(self).items() if value is not None}

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
    named = {field.name: content.get(field.name) for field in fields(SamplingDefaults)}
    try:
        return SamplingDefaults(**named | {"max_tokens": content.get("max_new_tokens")})
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
