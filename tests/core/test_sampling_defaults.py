"""A model's generation_config.json gives the sampling parameters that a caller leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest

from albireo_jax.core.errors import ModelError
from albireo_jax.core.sampling_defaults import NO_DEFAULTS, SamplingDefaults, read_sampling_defaults
from albireo_jax.core.types import SamplingParams


def _written(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_the_parameters_of_the_file_are_taken(tmp_path: Path) -> None:
    content = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "do_sample": True,
        "eos_token_id": [2, 7],
        "transformers_version": "4.51.0",
    }
    defaults = read_sampling_defaults(_written(tmp_path, content))
    assert defaults == SamplingDefaults(
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_tokens": 2048}
    )
    assert defaults.params() == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, max_tokens=2048
    )


def test_no_file_and_an_empty_one_leave_ours(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == NO_DEFAULTS
    assert read_sampling_defaults(tmp_path / "model.gguf") == NO_DEFAULTS
    assert read_sampling_defaults(_written(tmp_path, {})) == NO_DEFAULTS
    assert NO_DEFAULTS.params() == SamplingParams()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold an object"),
        ({"temperature": -1}, "temperature must be in"),
        ({"top_k": "many"}, "top_k must be an integer, got 'many'"),
        ({"max_new_tokens": 0}, "max_tokens must be"),
    ],
)
def test_a_broken_file_is_refused_by_its_path(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        read_sampling_defaults(_written(tmp_path, content))
    assert str(tmp_path) in str(refused.value)
