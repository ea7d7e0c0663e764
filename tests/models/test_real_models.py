"""Real models: perplexity of a text and log-probabilities of greedy answers equal those of transformers.

Perplexity: the text's first tokens without a beginning-of-text token, in windows that share no token
as input; each window starts from nothing and predicts the token after each of its own.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from albireo_jax.core.config import Dtype, Quantization
from albireo_jax.core.model_files import find_model
from albireo_jax.models.registry import load_model, model_config
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import make_mesh
from albireo_jax.text.tokenizer import Tokenizer

SMALL = ("stories260k", "babyllama105")
SMOLLM2 = "smollm2-135m-instruct-q4_1"
CHARACTERS = 40_000  # more than the windows need, less than a whole text


@functools.cache
def load(model: str, tp: int = 1, kind: Quantization | None = None) -> Decoder:
    files = find_model(model)
    config = replace(model_config(files), quantization=kind)
    return load_model(files, config=config, dtype=Dtype.FLOAT32, mesh=make_mesh(tp))


def golden(data_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((data_dir / "golden" / f"{name}.json").read_text())


def log_probabilities(model: Decoder, ids: list[int], padded_to: int) -> np.ndarray:
    """Of each token but the first, given those before it; padding at the end changes nothing before it."""
    padded = jnp.asarray(np.pad(ids, (0, padded_to - len(ids))), jnp.int32)
    log_probs_TV = np.asarray(jax.nn.log_softmax(model(padded)))
    return log_probs_TV[np.arange(len(ids) - 1), ids[1:]]


def perplexity(model: Decoder, ids: list[int], window: int) -> float:
    scored = [
        log_probabilities(model, ids[start : start + window + 1], window + 1)
        for start in range(0, len(ids) - 1, window)
    ]
    return float(np.exp(-np.concatenate(scored).mean()))


@pytest.mark.parametrize("name", SMALL)
def test_perplexity_of_small_models(data_dir: Path, name: str) -> None:
    folder, expected = data_dir / "models" / name, golden(data_dir, name)["ppl"]
    text = (data_dir / "text" / expected["text"]).read_text()[:CHARACTERS]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: expected["tokens"]]
    assert len(ids) == expected["tokens"]
    found = perplexity(load(str(folder)), ids, expected["window"])
    assert found == pytest.approx(expected["ppl"], rel=1e-5)


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_greedy_answers_of_small_models(data_dir: Path, name: str, tp: int) -> None:
    model = load(str(data_dir / "models" / name), tp)
    answers = golden(data_dir, name)["greedy"]
    longest = max(len(answer["input_ids"] + answer["output_ids"]) for answer in answers)
    for answer in answers:
        check_answer(model, answer, padded_to=longest, tolerance=5e-5)


def check_answer(model: Decoder, answer: dict[str, Any], *, padded_to: int, tolerance: float) -> None:
    """Each token of a greedy answer is our first choice too, and as probable."""
    prompt, output = answer["input_ids"], answer["output_ids"]
    padded = jnp.asarray(np.pad(prompt + output, (0, padded_to - len(prompt + output))), jnp.int32)
    log_probs_TV = np.asarray(jax.nn.log_softmax(model(padded)))
    predicting_TV = log_probs_TV[len(prompt) - 1 : len(prompt) + len(output) - 1]
    assert predicting_TV.argmax(axis=1).tolist() == output
    np.testing.assert_allclose(
        predicting_TV[np.arange(len(output)), output], answer["logprobs"], rtol=0, atol=tolerance
    )


@pytest.fixture
def smollm2() -> Decoder:
    return load("smollm2")


def test_greedy_answers_of_smollm2(data_dir: Path, smollm2: Decoder) -> None:
    """The golden answers came from weights that had been rounded to bfloat16; ours were not."""
    answers = golden(data_dir, SMOLLM2)["greedy"]
    longest = max(len(answer["input_ids"] + answer["output_ids"]) for answer in answers)
    for answer in answers:
        check_answer(smollm2, answer, padded_to=longest, tolerance=0.03)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), smollm2.weights())
    check_answer(
        Decoder(smollm2.config, rounded, smollm2.mesh), answers[0], padded_to=longest, tolerance=5e-5
    )


def smollm2_perplexity(data_dir: Path, model: Decoder) -> float:
    expected = golden(data_dir, SMOLLM2)["ppl"]
    text = (data_dir / "text" / expected["text"]).read_text()[:CHARACTERS]
    tokenizer = Tokenizer.from_files(find_model("smollm2"))
    ids = tokenizer.encode(text, add_special_tokens=False)[: expected["tokens"]]
    assert len(ids) == expected["tokens"]
    return perplexity(model, ids, expected["window"])


def test_perplexity_of_smollm2(data_dir: Path, smollm2: Decoder) -> None:
    wanted = golden(data_dir, SMOLLM2)["ppl"]["ppl"]
    assert smollm2_perplexity(data_dir, smollm2) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [(Quantization.INT8, 0.01), (Quantization.FP8, 0.03)])
def test_perplexity_of_smollm2_hardly_changes_when_it_is_quantised(
    data_dir: Path, kind: Quantization, most: float
) -> None:
    exact = golden(data_dir, SMOLLM2)["ppl"]["ppl"]
    assert smollm2_perplexity(data_dir, load("smollm2", kind=kind)) == pytest.approx(exact, rel=most)
