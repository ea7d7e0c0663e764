"""Text work of one decode step: every row gets one token, is decoded and searched for two stop strings.

Measures `Detokenizer.push` per row (without and with the stop strings), and beside it `DecodeStream` of the
tokenizers package, which decodes but knows no stop strings. SmolLM2's tokenizer, the words of a text file.
The aim: 128 rows with stop strings in 1 ms.

    python -m benchmarks.text_work
"""

import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import SamplingParams
from albireo_jax.measure.records import Series, series_by_metric
from albireo_jax.text.detokenizer import Detokenizer
from albireo_jax.text.gguf_tokenizer import load_gguf_tokenizer
from albireo_jax.text.tokenizer import Tokenizer
from benchmarks.lib.recording import Recording, script_parser

STOPS = ("\n\nUser:", "</answer>")
PROMPT_LEN = 32


def row_tokens(token_ids: list[int], rows: int, steps: int) -> list[list[int]]:
    """Prompt and answer of each row: a stretch of the text, each from a place of its own."""
    length = PROMPT_LEN + steps
    laps = token_ids * (-(-length // len(token_ids)) + 1)
    return [laps[start : start + length] for start in (row * 37 % len(token_ids) for row in range(rows))]


def time_steps(take: Callable[[int, int], object], tokens: list[list[int]], steps: int) -> tuple[float, ...]:
    """Milliseconds of each step, in which `take(row, token_id)` is called for every row."""
    samples: list[float] = []
    for step in range(steps):
        column = [row[PROMPT_LEN + step] for row in tokens]
        begin = time.perf_counter()
        for row, token_id in enumerate(column):
            take(row, token_id)
        samples.append((time.perf_counter() - begin) * 1e3)
    return tuple(samples)


def detokenizer_steps(
    tokenizer: Tokenizer, tokens: list[list[int]], steps: int, *, stop: tuple[str, ...]
) -> tuple[float, ...]:
    params = SamplingParams(max_tokens=None, stop=stop)
    rows = [Detokenizer(tokenizer, params, prompt_token_ids=row[:PROMPT_LEN]) for row in tokens]
    return time_steps(lambda row, token_id: rows[row].push((token_id,)), tokens, steps)


def decode_stream_steps(
    backend: tokenizers.Tokenizer, tokens: list[list[int]], steps: int
) -> tuple[float, ...]:
    rows = [DecodeStream(ids=row[:PROMPT_LEN], skip_special_tokens=True) for row in tokens]
    return time_steps(lambda row, token_id: rows[row].step(backend, token_id), tokens, steps)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parents[1] / "README.md")
    recording = Recording.begin(parser)
    options = recording.options
    parts = load_gguf_tokenizer(find_model("smollm2").path)
    tokenizer = Tokenizer(parts)
    token_ids = tokenizer.encode(options.text.read_text(encoding="utf-8"))
    series: list[Series] = []
    for rows in options.rows:
        tokens = row_tokens(token_ids, rows, options.steps)
        measured = {
            "decode": detokenizer_steps(tokenizer, tokens, options.steps, stop=()),
            "decode and 2 stop strings": detokenizer_steps(tokenizer, tokens, options.steps, stop=STOPS),
            "tokenizers' DecodeStream": decode_stream_steps(parts.backend, tokens, options.steps),
        }
        for subject, samples in measured.items():
            (one,) = series_by_metric(subject, f"{rows} rows", {("step", "ms"): samples})
            each = one.median / rows * 1e3
            print(f"{one.case:>9}  {subject:26} {one.median:.3f} ms a step, {each:.2f} µs a row")
            series.append(one)
    recording.write("text", series, settings={"stop": STOPS, "prompt_len": PROMPT_LEN})


if __name__ == "__main__":
    main()
