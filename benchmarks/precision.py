"""Fewer bits for weights, or for cached keys and values: their cost in perplexity, their bytes, recorded.

The same windows of a text, through one engine for each precision. A prompt's log probabilities come from the
same steps as any answer: what a token attends to, itself and earlier tokens of its own step included, is read
back from the pages, in their precision. The aims: int8 keys and values within 1% of bfloat16, in half of the
bytes; int8 weights within 1% of floats.

    python -m benchmarks.precision kv smollm2 TEXT_FILE
    python -m benchmarks.precision weights smollm2 TEXT_FILE
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, KvDtype, Quantization, SchedulerConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend
from albireo_jax.launch import launch
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.text.tokenizer import Tokenizer
from benchmarks.lib.recording import Recording, script_parser

FLOATS = "floats"
WINDOWS = (
    "Losses have one sample per window. Each window is a prompt of its own whose first token is not "
    "predicted; perplexity is the exponential of the mean loss of all the others. "
)
NOTES = {
    "kv": WINDOWS + "Weights and activations have the dtype of the settings. Bytes are of a page's keys and "
    "values of all layers, with their scales.",
    "weights": WINDOWS + "Floats, activations and keys and values have the dtype of the settings; bytes are "
    "those of all weights on one device, with the scales of codes. Codes are made of the model's floats as "
    "they are loaded, one scale per output channel; embedding and output head stay floats. int8 and "
    "fp8_w8a16 round weights only. fp8 also rounds what is multiplied with codes to e4m3, with a power of "
    "two per token as scale; a CPU multiplies the rounded numbers in the dtype of the settings: sums of the "
    "same products as of codes on a GPU, in another order.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLoss:
    """How badly a window's tokens were predicted: the mean of minus their log probabilities, in nats.

    The window's first token is predicted by nothing and not among the `num_predicted`.
    """

    nats_per_token: float
    num_predicted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionLosses:
    """One precision: the loss of each window, and the bytes of a page or of all weights."""

    losses: Sequence[WindowLoss]
    stored_bytes: int

    @property
    def perplexity(self) -> float:
        """E to the mean loss of all predicted tokens."""
        return perplexity(self.losses)


def cut_windows(token_ids: Sequence[int], *, count: int, length: int) -> list[tuple[int, ...]]:
    """The first `count` windows of `length` tokens, one after the other; ValueError if there are fewer."""
    if len(token_ids) < count * length:
        raise ValueError(f"{count} windows of {length} tokens do not fit in a text of {len(token_ids)}")
    return [tuple(token_ids[start : start + length]) for start in range(0, count * length, length)]


def window_losses(frontend: Frontend, windows: Sequence[Sequence[int]]) -> list[WindowLoss]:
    """The loss of each window, as a prompt of its own."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    losses: list[WindowLoss] = []
    for completion in frontend.generate(windows, params):
        logprobs = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
        losses.append(
            WindowLoss(nats_per_token=-math.fsum(logprobs) / len(logprobs), num_predicted=len(logprobs))
        )
    return losses


def perplexity(losses: Sequence[WindowLoss]) -> float:
    """E to the mean loss of all predicted tokens."""
    total = math.fsum(loss.nats_per_token * loss.num_predicted for loss in losses)
    return math.exp(total / sum(loss.num_predicted for loss in losses))


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("of", choices=tuple(NOTES), help="whose precision is compared")
    made.add_argument("model", help="a built-in name, folder or GGUF file")
    made.add_argument("text", type=Path)
    made.add_argument("--windows", type=int, default=8)
    made.add_argument("--length", type=int, default=512, help="tokens of a window")
    made.add_argument("--dtype", type=Dtype, choices=list(Dtype), default=Dtype.FLOAT32)
    made.add_argument("--kinds", nargs="+", help="precisions beside the first; by default all")
    made.add_argument("--max-rows", type=int, default=1)
    made.add_argument("--max-step-tokens", type=int, default=128)
    return made


def configs(options: Namespace) -> dict[str, EngineConfig]:
    """The engine of each precision, the one that the others are compared with first."""

    def config(kv_dtype: KvDtype, quantization: Quantization | None) -> EngineConfig:
        return EngineConfig(
            model=options.model,
            dtype=options.dtype,
            quantization=quantization,
            max_model_len=options.length + 1,
            max_logprobs=1,
            cache=CacheConfig(kv_dtype=kv_dtype),
            scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
        )

    if options.of == "kv":
        kinds = options.kinds or [KvDtype.FLOAT32, KvDtype.INT8, KvDtype.FP8]
        return {kind.value: config(kind, None) for kind in (KvDtype.BFLOAT16, *map(KvDtype, kinds))}
    coded = {
        kind.value: config(KvDtype.AUTO, kind) for kind in map(Quantization, options.kinds or Quantization)
    }
    return {FLOATS: config(KvDtype.AUTO, None), **coded}


def measure(windows: Sequence[Sequence[int]], config: EngineConfig, *, of: str) -> PrecisionLosses:
    """All windows with one engine."""
    with closing(launch(config)) as engine:
        memory = engine.memory
        return PrecisionLosses(
            losses=window_losses(engine.frontend, windows),
            stored_bytes=memory.page_bytes if of == "kv" else memory.weight_bytes,
        )


def series_of(measured: Mapping[str, PrecisionLosses], *, of: str, case: str) -> list[Series]:
    """The figures of all precisions."""
    reference = next(iter(measured))
    return [
        series
        for subject, own in measured.items()
        for series in series_by_metric(
            subject,
            case,
            {
                ("loss", "nats/token"): [loss.nats_per_token for loss in own.losses],
                ("predicted", "tokens"): [loss.num_predicted for loss in own.losses],
                ("perplexity", ""): [own.perplexity],
                (f"perplexity over that of {reference}", "1"): [
                    own.perplexity / measured[reference].perplexity
                ],
                ("page" if of == "kv" else "weights", "bytes"): [own.stored_bytes],
            },
        )
    ]


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    files = find_model(options.model)
    token_ids = Tokenizer.from_files(files).encode(options.text.read_text(encoding="utf-8"))
    windows = cut_windows(token_ids, count=options.windows, length=options.length)
    measured: dict[str, PrecisionLosses] = {}
    for kind, config in configs(options).items():
        own = measured[kind] = measure(windows, config, of=options.of)
        reference, first = next(iter(measured.items()))
        print(
            f"{kind:9} perplexity {own.perplexity:9.4f}, "
            f"{own.perplexity / first.perplexity:9.6f} of {reference}; "
            f"{own.stored_bytes:12} bytes, {own.stored_bytes / first.stored_bytes:6.4f} of {reference}",
            flush=True,
        )
    case = f"{options.windows} windows of {options.length} tokens"
    name = "kv-precision" if options.of == "kv" else "weight-precision"
    recording.write(
        f"{name}-{files.name}",
        series_of(measured, of=options.of, case=case),
        note=NOTES[options.of],
        settings={"model": files.name},
    )


if __name__ == "__main__":
    main()
