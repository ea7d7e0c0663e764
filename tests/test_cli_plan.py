"""`albireo plan` on the command line: its files, its messages, and an engine started from what it emits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from albireo_jax.cli import main
from albireo_jax.cli.config_file import read_flags
from albireo_jax.cli.options import EngineFlags, with_engine_flags
from albireo_jax.core.config import Dtype, EngineConfig, Quantization, SamplingMode
from albireo_jax.sim.host import OWN_HOST
from albireo_jax.sim.planning.calibration import (
    BucketTerms,
    Calibration,
    LoopTerms,
    SamplingTerms,
    Shard,
    StepTable,
    write_calibration,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}
QUICK = ("--rows", "4,16", "--step-tokens", "128", "--requests", "20")


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert isinstance(ended.value.code, int)
    shown = capfd.readouterr()
    return ended.value.code, shown.out, shown.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """40 requests, one every tenth of a second."""
    path = tmp_path / "trace.csv"
    lines = [f"{n / 10},{20 + n},{4 + n % 9},0," for n in range(40)]
    path.write_text("\n".join(("arrived_at,input_tokens,output_tokens,block_size,blocks", *lines)) + "\n")
    return path


def engine_config(path: Path) -> EngineConfig:
    """What `albireo serve MODEL --config` makes of a file."""
    found: list[EngineConfig] = []

    @with_engine_flags
    def command(*, engine: EngineFlags) -> None:
        found.append(engine.engine_config("a model"))

    app = typer.Typer()
    app.command()(command)
    app(["--config", str(path)], standalone_mode=False)
    return found[0]


def test_a_plan_is_shown_and_written(
    capfd: pytest.CaptureFixture[str], model: Path, trace: Path, tmp_path: Path
) -> None:
    written, emitted = tmp_path / "plan.json", tmp_path / "engine.yaml"
    asked = ("plan", model, "--gpus", 2, "--ttft", 200, "--tpot", 10, "--trace", trace)
    code, out, _ = run(capfd, *asked, *QUICK, "--json", written, "--emit", emitted)
    assert code == 0
    assert "best plan, simulated (roofline): t=" in out
    assert "runner-up, simulated (roofline): t=" in out
    assert "assumed, not measured" in out
    content = json.loads(written.read_text())
    assert content["label"] == "simulated (roofline)"
    config = engine_config(emitted)
    assert config.parallel.tp == content["best"]["tp"]
    assert config.scheduler.max_rows == content["best"]["max_rows"]
    assert config.scheduler.max_step_tokens == content["best"]["max_step_tokens"]
    assert (config.scheduler.depth, config.sampling, config.dtype) == (
        2,
        SamplingMode.SHARDED,
        Dtype.BFLOAT16,
    )
    assert set(read_flags(emitted, [name.replace("-", "_") for name in yaml.safe_load(emitted.read_text())]))


def test_quantised_matrices_leave_more_memory_and_are_emitted(
    capfd: pytest.CaptureFixture[str], model: Path, trace: Path, tmp_path: Path
) -> None:
    written, emitted = tmp_path / "plan.json", tmp_path / "engine.yaml"
    asked = ("plan", model, "--gpus", 1, "--ttft", 200, "--tpot", 10, "--trace", trace, "--json", written)
    held: dict[str, int] = {}
    for kind, flags in (("float", ()), ("int8", ("--quantization", "int8", "--emit", emitted))):
        assert run(capfd, *asked, *QUICK, *flags)[0] == 0
        held[kind] = json.loads(written.read_text())["best"]["tokens_held"]
    saved = 32 * (4 * 4096 + 3 * 11008) * 4096 - 4 * 32 * (5 * 4096 + 2 * 11008)
    assert held["int8"] - held["float"] == pytest.approx(saved / (2 * 2 * 32 * 4096), abs=16)
    assert "int8 matrices, the rest bfloat16" in written.read_text()
    assert engine_config(emitted).quantization is Quantization.INT8
    code, _, err = run(capfd, *asked, "--quantization", "fp8", "--calibration", written)
    assert (code, "quantization fp8 cannot be planned from steps of float weights" in err) == (2, True)


def test_a_calibration_says_what_steps_take(
    capfd: pytest.CaptureFixture[str], model: Path, trace: Path, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    steps = StepTable(
        buckets=(
            BucketTerms(tokens=16, rows=16, step_s=1e-3, samples=5),
            BucketTerms(tokens=128, rows=16, step_s=3e-3, samples=0),
        ),
        row_pair_s=1e-9,
        chunk_pair_s=1e-9,
    )
    shard = Shard(
        tp=1,
        is_shard_shaped=True,
        loops=(LoopTerms(depth=2, steps=steps, host=OWN_HOST),),
        sampling=SamplingTerms(rows=(16,), greedy_s=(1e-5,), filtered_s=(1e-4,)),
    )
    measured = Calibration(model="m", dtype="bfloat16", device="a GPU", source="a test", shards=(shard,))
    write_calibration(measured, path)
    asked = ("plan", model, "--gpus", 2, "--ttft", 200, "--tpot", 10, "--trace", trace, "--calibration", path)
    code, out, _ = run(capfd, *asked, *QUICK)
    assert code == 0
    assert "best plan, simulated (measured on a GPU): t=1, 2 replicas" in out
    assert "nothing says what its steps take" in out
    assert "of the steps are outside of what was measured" in out
    code, _, err = run(capfd, *asked, "--rows", 32, "--step-tokens", 128)
    assert (code, "has steps of at most 16 rows and 128 tokens" in err) == (2, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--gpu", "v100"), r"gpu 'v100' is not known; known are h100, h200, b200, a100, a100-pcie"),
        (("--tpot", "0.001"), r"no plan serves 90% of the requests within 200 ms .* a token at best (t="),
        (("--ttft", "0"), "the ttft target must be above 0 ms, got 0"),
        (("--rows", "a"), "--rows takes numbers and commas, such as 64,128; got 'a'"),
        (("--rows", "256"), "no step of 128 tokens has room for the 256 rows of the smallest plan"),
        (("--memory-share", "0.01"), "fits on 2 x NVIDIA H100 SXM 80 GB at no t. t=1:"),
        (("--gpus", "0"), "gpus must be at least 1, got 0"),
        (("--trace", "missing.csv"), "missing.csv cannot be read as a trace"),
        (("--calibration", "missing.json"), "there is no calibration missing.json"),
        (("--emit", "missing/engine.yaml"), "missing/engine.yaml cannot be written: there is no folder"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_is_answered_with_what_would_be_possible(
    capfd: pytest.CaptureFixture[str], model: Path, trace: Path, changed: tuple[str, str], message: str
) -> None:
    asked = ("plan", model, "--gpus", 2, "--ttft", 200, "--tpot", 10, "--trace", trace, *QUICK)
    code, _, err = run(capfd, *asked, *changed)
    assert code == 2
    for part in message.split(" .* "):
        assert part in err
    assert err.count("\n") == 1


def test_an_empty_trace_is_refused(capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("arrived_at,input_tokens,output_tokens,block_size,blocks\n")
    code, _, err = run(capfd, "plan", model, "--gpus", 2, "--ttft", 200, "--tpot", 10, "--trace", empty)
    assert (code, "the trace has no requests" in err) == (2, True)


@pytest.mark.compiles
def test_an_engine_starts_from_what_is_emitted(
    capfd: pytest.CaptureFixture[str], data_dir: Path, trace: Path, tmp_path: Path
) -> None:
    model, emitted = data_dir / "models" / "stories260k", tmp_path / "engine.yaml"
    quick = ("--rows", "2", "--step-tokens", "8", "--requests", "20")
    asked = ("plan", model, "--gpus", 2, "--ttft", 200, "--tpot", 10, "--trace", trace)
    assert run(capfd, *asked, *quick, "--emit", emitted)[0] == 0
    command = (sys.executable, "-m", "albireo_jax.cli", "generate", str(model), "--config", str(emitted))
    prompt = ("--virtual-devices", "2", "--prompt", "Once upon", "--max-tokens", "3", "--temperature", "0")
    answer = subprocess.run([*command, *prompt], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_a_config_json_is_planned_without_jax(model: Path, trace: Path) -> None:
    code = (
        "import sys\n"
        "from albireo_jax.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        "loaded = [name for name in ('jax', 'flax') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    asked = (
        "plan",
        str(model),
        "--gpus",
        "2",
        "--ttft",
        "200",
        "--tpot",
        "10",
        "--trace",
        str(trace),
        *QUICK,
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
