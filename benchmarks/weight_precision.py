"""What quantising a model's matrices costs in perplexity, and saves in bytes, recorded.

The same windows of a text, through an engine with floats and one for each kind of quantisation. The aim: int8
within 1% of the floats.

    python benchmarks/weight_precision.py smollm2 ../shared/data/text/wikitext2_test.txt
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, KvDtype, Quantization, SchedulerConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.launch import launch
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.text.tokenizer import Tokenizer
from benchmarks.lib.perplexity import WindowLoss, cut_windows, perplexity, window_losses

ROOT = Path(__file__).resolve().parents[1]
FLOATS = "floats"
NOTE = (
    "Losses have one sample per window. Each window is a prompt of its own whose first token is not "
    "predicted; perplexity is the exponential of the mean loss of all the others. Floats, activations and "
    "keys and values have the dtype of the settings; bytes are those of all weights on one device, with the "
    "scales of codes. Codes are made of the model's floats as they are loaded, one scale per output channel; "
    "embedding and output head stay floats. int8 and fp8_w8a16 round weights only. fp8 also rounds what is "
    "multiplied with codes to e4m3, with a power of two per token as scale; a CPU multiplies the rounded "
    "numbers in the dtype of the settings: sums of the same products as of codes on a GPU, in another order."
)


class Measured(NamedTuple):
    """What one way of storing the matrices came to."""

    losses: list[WindowLoss]
    weight_bytes: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a built-in name, folder or GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--dtype", type=Dtype, choices=list(Dtype), default=Dtype.FLOAT32)
    parser.add_argument("--max-step-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def measure(
    windows: list[tuple[int, ...]], kind: Quantization | None, *, options: argparse.Namespace
) -> Measured:
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        quantization=kind,
        max_model_len=options.length + 1,
        max_logprobs=1,
        cache=CacheConfig(kv_dtype=KvDtype.AUTO),
        scheduler=SchedulerConfig(max_rows=1, max_step_tokens=options.max_step_tokens),
    )
    engine = launch(config)
    try:
        return Measured(window_losses(engine.frontend, windows), engine.memory.weight_bytes)
    finally:
        engine.close()


def series(subject: str, measured: Measured, *, reference: Measured, case: str) -> list[Series]:
    own = perplexity(measured.losses)
    columns = {
        ("loss", "nats/token"): [loss.nats_per_token for loss in measured.losses],
        ("predicted", "tokens"): [loss.num_predicted for loss in measured.losses],
        ("perplexity", ""): [own],
        ("perplexity over that of the floats", "1"): [own / perplexity(reference.losses)],
        ("weights", "bytes"): [measured.weight_bytes],
    }
    return [
        Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(map(float, samples)))
        for (metric, unit), samples in columns.items()
    ]


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    files = find_model(options.model)
    token_ids = Tokenizer.from_files(files).encode(options.text.read_text(encoding="utf-8"))
    windows = cut_windows(token_ids, count=options.windows, length=options.length)
    measured: dict[str, Measured] = {}
    for kind in (None, *Quantization):
        own = measured[kind or FLOATS] = measure(windows, kind, options=options)
        ratio = perplexity(own.losses) / perplexity(measured[FLOATS].losses)
        saved = own.weight_bytes / measured[FLOATS].weight_bytes
        print(
            f"{kind or FLOATS:9} perplexity {perplexity(own.losses):9.4f}, {ratio:8.5f} of the floats'; "
            f"{own.weight_bytes:12} bytes of weights, {saved:6.4f} of the floats'",
            flush=True,
        )
    case = f"{options.windows} windows of {options.length} tokens"
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    record = Record(
        name=f"weight-precision-{files.name}",
        device=cpu_device(),
        settings={**settings, "model": files.name, "text": options.text.name},
        series=[
            one
            for subject, own in measured.items()
            for one in series(subject, own, reference=measured[FLOATS], case=case)
        ],
        note=NOTE,
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
