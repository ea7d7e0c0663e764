"""The registry knows what the configuration reader knows, and imports the rest on demand."""

import subprocess
import sys
from pathlib import Path

import pytest

from albireo_jax.core.architectures import ARCHITECTURES, BY_GGUF_NAME
from albireo_jax.core.errors import ModelError, UnknownArchitectureError
from albireo_jax.core.model_files import ModelFiles, ModelFormat
from albireo_jax.models.registry import model_class, model_config
from albireo_jax.nn.module import Decoder


def test_every_known_architecture_has_a_module_of_its_own() -> None:
    modules = {model_class(name) for name in ARCHITECTURES}
    assert len(modules) == len(ARCHITECTURES)
    assert all(issubclass(module, Decoder) for module in modules)
    assert set(BY_GGUF_NAME.values()) <= set(ARCHITECTURES)
    with pytest.raises(UnknownArchitectureError, match=r"'GPT2LMHeadModel' .*'LlamaForCausalLM'"):
        model_class("GPT2LMHeadModel")


def test_models_import_neither_orbax_nor_other_architectures() -> None:
    program = (
        "import sys, albireo_jax.models.registry; "
        "print([name for name in ('orbax.checkpoint', 'albireo_jax.models.qwen3') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_gguf_file_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    files = ModelFiles(path=path, format=ModelFormat.GGUF, name="x")
    with pytest.raises(UnknownArchitectureError, match="architecture 'None'"):
        model_config(files)
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + (1).to_bytes(8, "little") + bytes(8))
    with pytest.raises(ModelError, match=r"x\.gguf is not a readable GGUF file"):
        model_config(files)
