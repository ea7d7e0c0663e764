"""Golden tokens of real small models: what transformers answered in float32, greedily, from this device.

A model is asked in three ways. With *exact products* float32 means float32, and every token must be the
golden one. As the engine is otherwise, a GPU may round the factors of float32 products (TF32). In bfloat16
answers may part where the golden answer's two best tokens were close: that margin is kept.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, SchedulerConfig
from albireo_jax.core.errors import UnknownModelError
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.types import Request
from albireo_jax.launch import prepare
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.loops import answers_of

_GOLDEN = {
    "stories260k": "stories260k.json",
    "babyllama105": "babyllama105.json",
    "smollm2": "smollm2-135m-instruct-q4_1.json",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenWay:
    """A way to compute, under its name."""

    name: str
    dtype: Dtype
    exact: bool = False


_WAYS = (
    GoldenWay(name="float32, exact products", dtype=Dtype.FLOAT32, exact=True),
    GoldenWay(name="bfloat16", dtype=Dtype.BFLOAT16),
    GoldenWay(name="float32", dtype=Dtype.FLOAT32),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenAnswer:
    """A prompt, its golden continuation, and by how much the best token led at each place."""

    input_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    margins: tuple[float, ...]


def read_golden(path: Path) -> list[GoldenAnswer]:
    """The answers in a file of golden tokens."""
    return [
        GoldenAnswer(
            input_ids=tuple(answer["input_ids"]),
            output_ids=tuple(answer["output_ids"]),
            margins=tuple(answer["top2_margin"]),
        )
        for answer in json.loads(path.read_text())["greedy"]
    ]


def parting_margin(golden: GoldenAnswer, answer: Sequence[int]) -> float | None:
    """The lead of the golden token where an answer first has another one; None if it has none."""
    pairs = zip(golden.output_ids, answer, golden.margins, strict=True)
    return next((margin for wanted, got, margin in pairs if wanted != got), None)


def run_golden(check: Check) -> None:
    """All models in all ways, the strictest first; a small check only the first of both."""
    data = check.data_folder()
    models, ways = (list(_GOLDEN)[:1], _WAYS[:1]) if check.small else (list(_GOLDEN), _WAYS)
    for way in ways:
        for model in models:
            if check.figures.has_time(f"{model}, {way.name}"):
                with check.figures.attempt(f"{model}, {way.name}"):
                    _ask(check, model, way, data=data)


def _ask(check: Check, model: str, way: GoldenWay, *, data: Path) -> None:
    folder = data / "models" / model
    config = EngineConfig(
        model=str(folder) if folder.is_dir() else model,
        dtype=way.dtype,
        max_model_len=200,
        max_logprobs=0,
        cache=CacheConfig(num_pages=64),
        scheduler=SchedulerConfig(max_rows=4, max_step_tokens=32),
    )
    golden = read_golden(data / "golden" / _GOLDEN[model])
    try:
        with jax.default_matmul_precision("highest") if way.exact else nullcontext():
            ready = prepare(config)
    except UnknownModelError as error:
        check.figures.leave_out(f"{model}, {way.name}", str(error))
        return
    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=token_array("a golden prompt", one.input_ids),
            max_tokens=len(one.output_ids),
        )
        for index, one in enumerate(golden)
    ]
    answers = answers_of(ready.loop, requests)
    margins = [parting_margin(one, answer) for one, answer in zip(golden, answers, strict=True)]
    equal = sum(margin is None for margin in margins) / len(margins)
    worst = max((margin for margin in margins if margin is not None), default=0.0)
    figures = check.figures
    figures.add(model, way.name, metric="share of equal answers", unit="1", samples=[equal])
    figures.add(model, way.name, metric="largest margin where answers part", unit="1", samples=[worst])
