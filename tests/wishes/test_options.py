"""An engine option means the same as an argument of LLM, as a flag and as a key of a YAML file."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from albireo_jax import LLM
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.core.config import EngineConfig

NAMES_AS_FLAGS = {"host_kv_memory_bytes": "host_kv_memory"}
NO_FLAGS = {"self", "model", "measure_sampling", "progress", "unknown"}

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
    parameters = inspect.signature(LLM.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NO_FLAGS}


def test_llm_and_the_flags_have_the_same_options_and_defaults() -> None:
    flags = {field.name: field.default for field in fields(EngineFlags) if field.name != "config"}
    options = {NAMES_AS_FLAGS.get(name, name): default for name, default in defaults_of_llm().items()}
    assert MISSING not in flags.values()
    assert options == flags


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
