"""What the precision of cached keys and values costs in perplexity, and saves in bytes, recorded.

The same windows of a text, through the paged cache of one engine for each precision. The aim: int8 within 1%
of bfloat16, in half of its bytes.

    python benchmarks/kv_precision.py smollm2 ../shared/data/text/wikitext2_test.txt
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from albireo_jax.core.config import CacheConfig, Dtype, EngineConfig, KvDtype, SchedulerConfig
from albireo_jax.core.model_files import find_model
from albireo_jax.launch import launch
from albireo_jax.measure.records import Record, Series, cpu_device, write_record
from albireo_jax.text.tokenizer import Tokenizer
from benchmarks.lib.perplexity import WindowLoss, cut_windows, perplexity, window_losses

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = KvDtype.BFLOAT16
NOTE = (
    "Losses have one sample per window. Each window is a prompt of its own whose first token is not "
    "predicted; perplexity is the exponential of the mean loss of all the others. Weights and activations "
    "have the dtype of the settings. Bytes are of a page's keys and values of all layers, with their scales."
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a built-in name, folder or GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--dtype", type=Dtype, choices=list(Dtype), default=Dtype.FLOAT32)
    parser.add_argument(
        "--kv-dtypes",
        type=KvDtype,
        nargs="+",
        default=[KvDtype.FLOAT32, KvDtype.INT8, KvDtype.FP8],
        help=f"beside {REFERENCE}",
    )
    parser.add_argument("--max-rows", type=int, default=1)
    parser.add_argument("--max-step-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


class Measured(NamedTuple):
    """What one precision came to."""

    losses: list[WindowLoss]
    page_bytes: int


def measure(windows: list[tuple[int, ...]], kv_dtype: KvDtype, *, options: argparse.Namespace) -> Measured:
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.length + 1,
        max_logprobs=1,
        cache=CacheConfig(kv_dtype=kv_dtype),
        scheduler=SchedulerConfig(max_rows=options.max_rows, max_step_tokens=options.max_step_tokens),
    )
    engine = launch(config)
    try:
        return Measured(window_losses(engine.frontend, windows), engine.memory.page_bytes)
    finally:
        engine.close()


def line(kv_dtype: KvDtype, measured: dict[KvDtype, Measured]) -> str:
    """A precision beside the reference."""
    own, reference = measured[kv_dtype], measured[REFERENCE]
    ratio = perplexity(own.losses) / perplexity(reference.losses)
    return (
        f"{kv_dtype:9} perplexity {perplexity(own.losses):9.4f}, {ratio:9.6f} of {REFERENCE}'s; "
        f"{own.page_bytes:8} bytes a page, {own.page_bytes / reference.page_bytes:6.4f} of {REFERENCE}'s"
    )


def series(kv_dtype: KvDtype, measured: Measured, case: str) -> list[Series]:
    columns = {
        ("loss", "nats/token"): [loss.nats_per_token for loss in measured.losses],
        ("predicted", "tokens"): [loss.num_predicted for loss in measured.losses],
        ("perplexity", ""): [perplexity(measured.losses)],
        ("page", "bytes"): [measured.page_bytes],
    }
    return [
        Series(subject=kv_dtype, case=case, metric=metric, unit=unit, samples=tuple(samples))
        for (metric, unit), samples in columns.items()
    ]


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    files = find_model(options.model)
    token_ids = Tokenizer.from_files(files).encode(options.text.read_text(encoding="utf-8"))
    windows = cut_windows(token_ids, count=options.windows, length=options.length)
    measured: dict[KvDtype, Measured] = {}
    for kv_dtype in dict.fromkeys((REFERENCE, *options.kv_dtypes)):
        measured[kv_dtype] = measure(windows, kv_dtype, options=options)
        print(f"{kv_dtype}: {perplexity(measured[kv_dtype].losses):.4f}")
    print("\n".join(line(kv_dtype, measured) for kv_dtype in measured))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    case = f"{options.windows} windows of {options.length} tokens"
    record = Record(
        name=f"kv-precision-{files.name}",
        device=cpu_device(),
        settings={**settings, "model": files.name, "text": options.text.name},
        series=[one for kv_dtype, own in measured.items() for one in series(kv_dtype, own, case)],
        note=NOTE,
        load_before=load_before,
    )
    print(write_record(record, options.output))


if __name__ == "__main__":
    main()
