"""The options of an engine by name, and a configuration with some of them changed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from albireo_jax.core.config import STEP_TOKENS, EngineConfig
from albireo_jax.core.options import OptionField, options_of

ENGINE_OPTIONS = options_of(EngineConfig)
"""The options of an engine, in the order in which help shows them."""


def engine_option(name: str) -> OptionField:
    """The option of this name; raises ValueError for another one."""
    for option in ENGINE_OPTIONS:
        if option.name == name:
            return option
    raise ValueError(f"there is no option {name!r}; known are {[option.name for option in ENGINE_OPTIONS]}")


def engine_config(model: str, values: Mapping[str, Any]) -> EngineConfig:
    """The configuration of an engine for `model` with the options that `values` gives, others by default."""
    return override(EngineConfig(model=model, step_tokens_by_device=True), values)


def override(config: EngineConfig, values: Mapping[str, Any]) -> EngineConfig:
    """The configuration with the options that `values` gives by name; raises ValueError for what is refused.

    `max_step_tokens` None leaves them to the device.
    """

    def of(section: str) -> dict[str, Any]:
        own = [option for option in ENGINE_OPTIONS if option.section == section and option.name in given]
        return {option.field: given[option.name] for option in own}

    given = dict(values)
    by_device = config.step_tokens_by_device
    if "max_step_tokens" in given:
        by_device = given["max_step_tokens"] is None
        given["max_step_tokens"] = STEP_TOKENS if by_device else given["max_step_tokens"]
    return replace(
        config,
        **of(""),
        parallel=replace(config.parallel, **of("parallel")),
        scheduler=replace(config.scheduler, **of("scheduler")),
        cache=replace(config.cache, **of("cache")),
        gpu=replace(config.gpu, **of("gpu")),
        step_tokens_by_device=by_device,
    )
