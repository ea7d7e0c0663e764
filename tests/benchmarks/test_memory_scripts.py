"""The scripts that measure the KV memory, on small settings: their records tell what they should."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
TRACE = """arrived_at,input_tokens,output_tokens,block_size,blocks
0.0,1300,90,512,1 2 3
0.0,1300,90,512,1 2 4
3.0,1000,90,512,1 2
6.0,9000,90,512,1 2 3 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25
9.0,1300,90,512,1 2 3
"""

Samples = dict[tuple[str, str, str], list[float]]
Script = Callable[..., Samples]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs a script and gives the samples of its record by subject, case and metric."""

    def execute(name: str, *arguments: object) -> Samples:
        argv = [name, *map(str, arguments), "--output", str(tmp_path / "records")]
        monkeypatch.setattr("sys.argv", argv)
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        (path,) = (tmp_path / "records").iterdir()
        series: list[dict[str, Any]] = json.loads(path.read_text())["series"]
        return {(one["subject"], one["case"], one["metric"]): one["samples"] for one in series}

    return execute


def test_prefixes_of_a_trace(run: Script, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    samples = run("prefix", trace, "--context", 256, "--device-share", 0.5, "--host-share", 0, 1)
    # Scaled to pages of 16: prompts of 41, 41, 31, 224 (cut) and 41 tokens.
    assert samples["trace", "ideal, one after the other", "prompts"] == [378]
    assert samples["trace", "ideal, one after the other", "cached"] == [32 + 16 + 32 + 32]
    assert samples["trace", "ideal, each moment's together", "cached"] == [16 + 32 + 32]
    found = {case: rates[0] for (_, case, metric), rates in samples.items() if metric == "cached"}
    assert 80 <= found["memory for all"] <= 112
    assert found["pages for 0.5 of the demand, host pages for 0"] <= found["memory for all"]


@pytest.mark.compiles
def test_second_turns(run: Script, data_dir: Path) -> None:
    model, questions = data_dir / "models" / "stories260k", data_dir / "prompts" / "mt_bench_question.jsonl"
    lengths = ("--context", 256, "--first-prompt", 100, "--answer", 16, "--max-step-tokens", 64)
    samples = run("chat_turns", model, questions, "--turns", 6, "--users", 1, *lengths)
    by_metric = {(subject, metric): taken for (subject, _, metric), taken in samples.items()}
    assert {len(taken) for taken in by_metric.values()} == {3}
    pages = by_metric["caching", "first turn's pages"]
    assert sum(by_metric["caching", "first turn's pages found"]) >= 0.8 * sum(pages) > 0


@pytest.mark.compiles
def test_precision_of_keys_and_values(run: Script, data_dir: Path) -> None:
    model, text = data_dir / "models" / "stories260k", data_dir / "text" / "tinyshakespeare.txt"
    sizes = ("--windows", 2, "--length", 24, "--max-step-tokens", 32)
    samples = run("precision", "kv", model, text, "--kinds", "fp8", *sizes)
    by_metric = {(subject, metric): taken for (subject, _, metric), taken in samples.items()}
    # Heads of 8: 16 bytes of bfloat16, or 8 and a scale of 2.
    assert by_metric["fp8", "page"][0] / by_metric["bfloat16", "page"][0] == 10 / 16
    # A window is one step: its tokens' keys and values are read in the precision of the pages nevertheless.
    exact, coarse = by_metric["bfloat16", "loss"], by_metric["fp8", "loss"]
    assert all(1e-4 < abs(a - b) < 0.3 for a, b in zip(exact, coarse, strict=True))
