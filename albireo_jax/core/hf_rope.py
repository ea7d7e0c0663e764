"""Rotary embeddings as Hugging Face configurations describe them: both spellings in, the newer one out.

transformers 5 writes `rope_parameters`; older files have `rope_theta` beside `rope_scaling`. A key that is
not known to the kind of scaling, and two places that contradict each other, are refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

from albireo_jax.core.errors import ModelError
from albireo_jax.core.json_fields import Json, integer, positive, truth
from albireo_jax.core.model_config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

_DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_ANY_TYPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned"}
_OF_TYPE: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
"""Kinds of scaling that are supported, and their keys beside those that all may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Base and scaling of the rotations, and the positions that they are good for."""

    theta: float
    scaling: RopeScaling | None
    max_position: int


def read_rope(config: Json) -> Rope:
    """All that a config.json says of rotary embeddings. Raises ModelError naming key and value."""
    parameters = _parameters(config)
    kind = _rope_type(parameters)
    theta = positive(parameters, "rope_theta", _DEFAULT_THETA)
    max_position = integer(config, "max_position_embeddings")
    scaling = _scaling(kind, parameters, max_position=max_position)
    if isinstance(scaling, YarnRopeScaling):  # files keep the length that the model was trained at
        if theta <= 1:
            raise ModelError(f"config.json: rope_theta must be above 1 for yarn, got {theta}")
        max_position = max(max_position, int(scaling.factor * scaling.original_max_position))
    return Rope(theta=theta, scaling=scaling, max_position=max_position)


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` that read back as the rotations of `config`."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    match config.rope_scaling:
        case LinearRopeScaling(factor=factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case Llama3RopeScaling() as scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_max_position,
            }
        case YarnRopeScaling() as scaling:
            rope |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncates,
                _ORIGINAL: scaling.original_max_position,
            }
        case None:
            pass
    return rope


def _parameters(config: Json) -> Json:
    """`rope_parameters` as transformers 5 writes them, from the older keys if need be."""
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise ModelError(f"config.json: {key} must be an object, got {rope!r:.200}")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise ModelError(
            f"config.json: rope_parameters {given['rope_parameters']!r} and rope_scaling "
            f"{given['rope_scaling']!r} contradict each other"
        )
    parameters: dict[str, Any] = dict(next(iter(given.values()), {}))
    for key in ("rope_theta", "partial_rotary_factor"):
        beside, within = config.get(key), parameters.get(key)
        if beside is not None and within is not None and beside != within:
            raise ModelError(
                f"config.json: {key} is {beside!r}, but {within!r} in {next(iter(given))}, they contradict "
                f"each other"
            )
        parameters[key] = beside if within is None else within
    if positive(parameters, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"config.json: partial_rotary_factor {parameters['partial_rotary_factor']} is not supported"
        )
    return parameters


def _rope_type(parameters: Json) -> str:
    """The kind of scaling, after a check that no key asks for more."""
    by_layer = [key for key, value in parameters.items() if isinstance(value, dict)]
    if by_layer:
        raise ModelError(
            f"config.json: rope parameters for each kind of layer ({', '.join(by_layer)}) are not supported"
        )
    names = [parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise ModelError(f"config.json: rope_type {names[0]!r} and type {names[1]!r} contradict each other")
    kind = names[0] if names else "default"
    if not isinstance(kind, str) or kind not in _OF_TYPE:
        raise ModelError(
            f"config.json: rope_type {kind!r} is not supported; those are {', '.join(map(repr, _OF_TYPE))}"
        )
    for key, value in parameters.items():
        if value is not None and key not in _ANY_TYPE | _OF_TYPE[kind]:
            raise ModelError(
                f"config.json: {key} {value!r:.200} is not known for rope_type {kind!r}"
                + ("" if names else ", which is what no rope_type means")
            )
    return kind


def _scaling(kind: str, parameters: Json, *, max_position: int) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = positive(parameters, "factor")
    if kind == "linear":
        return LinearRopeScaling(factor=factor)
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=factor,
            low_freq_factor=positive(parameters, "low_freq_factor"),
            high_freq_factor=positive(parameters, "high_freq_factor"),
            original_max_position=integer(parameters, _ORIGINAL),
        )
    return YarnRopeScaling(
        factor=factor,
        original_max_position=integer(parameters, _ORIGINAL, max_position),
        attention_factor=_attention_factor(parameters, factor),
        beta_fast=positive(parameters, "beta_fast", 32.0),
        beta_slow=positive(parameters, "beta_slow", 1.0),
        truncates=parameters.get("truncate") is None or truth(parameters, "truncate"),
    )


def _attention_factor(parameters: Json, factor: float) -> float:
    """As given, or from the paper's formula (arXiv 2309.00071, equation 22) for the scales that are given."""
    if parameters.get("attention_factor") is not None:
        return positive(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        scale, all_dim = positive(parameters, "mscale"), positive(parameters, "mscale_all_dim")
        return yarn_attention_factor(factor, scale) / yarn_attention_factor(factor, all_dim)
    return yarn_attention_factor(factor)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of queries and keys by the paper's formula, for a file that gives none."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
