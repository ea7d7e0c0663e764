"""An engine option means the same as an argument of LLM, as a flag and as a key of a YAML file."""

import inspect
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from albireo_jax import LLM
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.core.config import (
    STEP_TOKENS,
    CacheConfig,
    EngineConfig,
    EngineOverrides,
    KvDtype,
    SchedulerConfig,
)
from albireo_jax.core.engine_options import ENGINE_OPTIONS, engine_config, override
from albireo_jax.core.gpu_options import GpuConfig, LayerForm
from albireo_jax.core.options import alternatives

NAMES_AS_FLAGS = {"host_kv_memory_bytes": "host_kv_memory"}
NO_FLAGS = {"model", "config", "measure_sampling", "progress"}

VALUES: dict[str, tuple[str, str]] = {
    "tp": ("2", "tp must be one of"),
    "virtual_devices": ("4", "virtual_devices must be"),
    "dtype": ("bfloat16", "dtype"),
    "quantization": ("int8", "quantization"),
    "max_model_len": ("128", "max_model_len must be"),
    "max_rows": ("3", "max_rows must be"),
    "max_step_tokens": ("96", "max_step_tokens must be"),
    "num_pages": ("77", "num_pages must be"),
    "page_size": ("8", "page_size must be"),
    "kv_cache_dtype": ("fp8", "kv_cache_dtype"),
    "memory_share": ("0.5", "memory_share must be"),
    "max_logprobs": ("4", "max_logprobs must be"),
    "depth": ("3", "depth must be"),
    "decode_steps": ("2", "decode_steps must be"),
    "scheduling_policy": ("priority", "scheduling_policy"),
    "sampling": ("replicated", "sampling"),
    "attention": ("xla", "attention"),
    "generation_config": ("none", "generation_config"),
}
"""A value of each option that is not its default, and the beginning of what refuses the text "-7"."""


SWITCHES = {
    "prefix_caching": ("--no-prefix-caching", "false"),
    "cuda_graph_collectives": ("--cuda-graph-collectives", "true"),
}
"""The flag and the value by which a switch leaves its default."""


def configured(*arguments: str) -> EngineConfig | str:
    """The configuration that a command line means, or the words that refuse it."""
    seen: list[EngineConfig] = []
    app = typer.Typer()

    @app.command()
    @with_engine_flags
    def _(engine: EngineFlags) -> None:
        seen.append(engine.engine_config("model"))

    result = CliRunner().invoke(app, list(arguments))
    return seen[0] if seen else f"{result.output} {result.exception}"


def defaults_of_llm() -> dict[str, Any]:
    parameters = inspect.signature(LLM).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NO_FLAGS}


def test_llm_and_the_flags_have_the_same_options_and_defaults() -> None:
    @with_engine_flags
    def command(*, engine: EngineFlags) -> None:
        raise AssertionError(engine)

    parameters = inspect.signature(command).parameters.values()
    flags = {parameter.name: parameter.default for parameter in parameters if parameter.name != "config"}
    options = {NAMES_AS_FLAGS.get(name, name): default for name, default in defaults_of_llm().items()}
    assert inspect.Parameter.empty not in flags.values()
    assert options == flags


def test_the_keyword_arguments_that_types_know_are_the_fields_of_the_configuration() -> None:
    """Type checkers read the `TypedDict`, all else the fields; texts stand for members of enumerations."""

    def as_keyword(kind: Any) -> Any:
        texts = [str if issubclass(member, StrEnum) else member for member in alternatives(kind)]
        return texts[0] | None if type(None) in get_args(kind) else texts[0]

    assert get_type_hints(EngineOverrides) == {
        option.name: as_keyword(option.kind) for option in ENGINE_OPTIONS
    }
    shown = inspect.signature(LLM).parameters
    assert {name: shown[name].annotation for name in defaults_of_llm()} == get_type_hints(EngineOverrides)


def test_no_option_gives_the_same_configuration_as_all_defaults() -> None:
    assert engine_config("model", {}) == engine_config("model", defaults_of_llm()) == configured()


def test_overrides_change_what_they_name_and_keep_the_rest_of_a_configuration() -> None:
    config = EngineConfig(
        model="model",
        max_logprobs=3,
        cache=CacheConfig(page_size=4),
        scheduler=SchedulerConfig(max_step_tokens=96, max_copied_pages=5),
        gpu=GpuConfig(layer_form=LayerForm.UNSTACKED),
    )
    assert override(config, {}) == config
    changed = override(config, {"depth": 1, "kv_cache_dtype": "fp8"})
    assert changed == replace(
        config,
        scheduler=replace(config.scheduler, depth=1),
        cache=replace(config.cache, kv_dtype=KvDtype.FP8),
    )
    by_device = override(config, {"max_step_tokens": None})
    assert (by_device.step_tokens_by_device, by_device.scheduler.max_step_tokens) == (True, STEP_TOKENS)
    assert override(by_device, {"max_step_tokens": 96}) == config


@pytest.mark.parametrize("name", VALUES)
def test_an_option_is_refused_by_name_whichever_configuration_holds_it(name: str) -> None:
    with pytest.raises(ValueError, match=VALUES[name][1]):
        engine_config("model", {name: -7})


def test_llm_takes_a_configuration_and_nothing_else_for_one() -> None:
    given: Any = {"tp": 2}
    with pytest.raises(ValueError, match=r"config must be an EngineConfig, got \{'tp': 2\}"):
        LLM("no such model", given)
    with pytest.raises(ValueError, match="no such model"):
        LLM("no such model", EngineConfig(model="another"), depth=1)


def test_every_option_that_takes_a_value_is_tried() -> None:
    taken = {NAMES_AS_FLAGS.get(name, name) for name in defaults_of_llm()}
    assert taken - {"host_kv_memory"} == {*VALUES, *SWITCHES}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_and_a_key_mean_the_same(name: str, tmp_path: Path) -> None:
    value, said = VALUES[name]
    flag = f"--{name.replace('_', '-')}"
    file = tmp_path / "engine.yaml"
    for key in (name, name.replace("_", "-")):
        file.write_text(f"{key}: {value}\n")
        wanted = configured(flag, value)
        assert isinstance(wanted, EngineConfig)
        assert wanted not in (configured(), f"--{key}")
        assert configured("--config", str(file)) == wanted
        file.write_text(f"{key}: -7\n")
        refusals = (configured(flag, "-7"), configured("--config", str(file)))
        assert all(isinstance(refusal, str) and said in refusal.replace("-", "_") for refusal in refusals), (
            refusals
        )


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_and_a_key_mean_the_same(name: str, tmp_path: Path) -> None:
    flag, value = SWITCHES[name]
    file = tmp_path / "engine.yaml"
    for key in (name, name.replace("_", "-")):
        file.write_text(f"{key}: {value}\n")
        wanted = configured(flag)
        assert isinstance(wanted, EngineConfig)
        assert wanted != configured()
        assert configured("--config", str(file)) == wanted
        file.write_text(f"{key}: sometimes\n")
        refusal = configured("--config", str(file))
        assert isinstance(refusal, str)
        assert name in refusal.replace("-", "_")
