"""The command line explains itself, reads YAML, and fails in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from albireo_jax.cli import main
from albireo_jax.cli.config_file import read_flags

ENGINE_FLAGS = (
    "config tp virtual-devices dtype quantization max-model-len max-rows max-step-tokens num-pages page-size "
    "kv-cache-dtype host-kv-memory prefix-caching no-prefix-caching depth decode-steps sampling"
)
SWEEP_FLAGS = (
    "gpus tp out batch-per-gpu input-len output-len trace scale rate-scale rate requests virtual-devices "
    "one-replica replicas-together interleave no-interleave gpu-memory dtype max-step-tokens page-size "
    "temperature top-p repeats warmups seed record"
)
SERVE_FLAGS = (
    "served-model-name host port api-key tool-call-parser reasoning-parser stream-interval frontends restarts"
)


class Outcome:
    """The output of a command line and its exit status."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        self.code = ended.value.code
        self.out, self.err = capfd.readouterr()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("", "serve generate bench calibrate report sweep --version"),
        ("serve", f"{ENGINE_FLAGS} {SERVE_FLAGS} MODEL smollm2"),
        ("generate", f"{ENGINE_FLAGS} --prompt --chat --seed --stop MODEL"),
        ("bench", "throughput latency host"),
        ("bench throughput", f"{ENGINE_FLAGS} requests input-len output-len MODEL"),
        ("bench latency", f"{ENGINE_FLAGS} requests input-len output-len MODEL"),
        ("bench host", "rows steps"),
        ("calibrate", "--tp --shard-shaped --depths --repeats --output CONFIG"),
        ("report", f"{ENGINE_FLAGS} requests input-len output-len trace scale out from MODEL"),
        ("sweep", f"{SWEEP_FLAGS} MODEL smollm2"),
    ],
)
def test_help_names_everything(capfd: pytest.CaptureFixture[str], command: str, expected: str) -> None:
    outcome = Outcome(capfd, *command.split(), "--help")
    assert outcome.code == 0
    for word in expected.split():
        assert word in outcome.out
    assert f"albireo {command}".strip() in outcome.out
    assert outcome.err == ""


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(capfd, "--version")
    assert outcome.code == 0
    assert outcome.out.startswith("albireo 0.")


def test_the_command_line_alone_imports_no_jax() -> None:
    script = "import sys, albireo_jax.cli; print({'jax', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve nothing-here", "no model 'nothing-here'"),
        ("serve smollm2 --tp 3", "tp must be one of [1, 2, 4, 8], got 3"),
        ("serve smollm2 --tp 2 --virtual-devices 1", "virtual_devices 1 is below tp 2"),
        ("serve smollm2 --depth 9", "depth must be between 1 and 8, got 9"),
        ("serve smollm2 --page-size 3", "page_size must be a power of two"),
        ("serve smollm2 --host-kv-memory=-1", "host_memory_bytes must not be negative, got -1073741824"),
        ("serve smollm2 --host-kv-memory inf", "host_kv_memory must be a finite number, got inf"),
        ("serve smollm2 --max-rows 0", "max_rows must be at least 1, got 0"),
        ("serve smollm2 --port 70000", "port must be between 0 and 65535, got 70000"),
        ("serve smollm2 --host 256.256.256.256", "cannot listen at 256.256.256.256 port 8000"),
        ("generate nothing-here --prompt x", "no model 'nothing-here'"),
        ("generate smollm2 --prompt x --temperature nan", "temperature must be a finite number, got nan"),
        ("generate smollm2 --prompt x --max-tokens 0", "max_tokens must be at least 1, got 0"),
        ("bench throughput nothing-here", "no model 'nothing-here'"),
        ("serve nothing-here --dtype auto", "no model 'nothing-here'"),
        ("report nothing-here", "no model 'nothing-here'"),
        ("report", "name a MODEL to run or, with --from, an earlier report, and not both"),
        (
            "report smollm2 --from x.json",
            "name a MODEL to run or, with --from, an earlier report, and not both",
        ),
        ("report --from nothing.json", "nothing.json is not a report that can be read"),
        ("report smollm2 --requests 0", "at least 1, got 0"),
        ("report smollm2 --trace nothing.csv", "nothing.csv cannot be read as a trace"),
        ("report smollm2 --tp 3", "tp must be one of [1, 2, 4, 8], got 3"),
        ("sweep nothing-here --gpus 8", "no model 'nothing-here'"),
        (
            "sweep smollm2 --gpus 8 --tp 1,two",
            "tp must be degrees apart by commas, such as 1,2,4, got '1,two'",
        ),
        ("sweep smollm2 --gpus 8 --tp 16", "tp 16 needs 16 GPUs, the cluster has 8"),
        ("sweep smollm2 --gpus 6 --tp 1,4", "6 GPUs cannot be divided into replicas of 4"),
        ("sweep smollm2 --gpus 2 --tp 2 --virtual-devices 2", "tp 2 does not divide this model"),
        ("sweep smollm2 --gpus 1 --tp 1 --rate 1 --trace x.csv", "--rate and --trace are two loads"),
        ("sweep smollm2 --gpus 1 --tp 1 --rate-scale 2", "--scale and --rate-scale change a trace"),
        ("sweep smollm2 --gpus 1 --tp 1 --requests 2", "--requests goes with --rate or --trace"),
        ("sweep smollm2 --gpus 1 --tp 1 --gpu-memory nan", "gpu_memory must be a finite number of GiB"),
        ("sweep smollm2 --gpus 1 --tp 1 --virtual-devices 1 --gpu-memory 0.1", "it fits at no degree"),
    ],
)
def test_a_callers_error_is_one_line(capfd: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    outcome = Outcome(capfd, *arguments.split())
    assert outcome.code == 2
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("albireo: ")
    assert message in lines[0]


def test_a_report_without_the_package_that_draws_says_how_to_get_it() -> None:
    script = """
import sys
sys.modules['matplotlib'] = None
from albireo_jax.cli import main
main(['report', 'smollm2'])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "albireo: matplotlib is missing: pip install 'albireo-jax[experiments]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve", "MODEL"),
        ("serve smollm2 --depth two", "--depth"),
        ("serve smollm2 --sampling maybe", "--sampling"),
        ("serve smollm2 --no-such-flag", "--no-such-flag"),
        ("serve smollm2 extra", "extra"),
        ("generate smollm2", "--prompt"),
        ("fly", "fly"),
    ],
)
def test_a_misspelt_command_is_explained(
    capfd: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    outcome = Outcome(capfd, *arguments.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_taken_port_is_told_before_the_model_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    from albireo_jax.serving.server import bind

    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        outcome = Outcome(capfd, "serve", "smollm2", "--port", str(port))
    assert outcome.code == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in outcome.err


def test_flags_from_a_file_and_the_command_line_wins(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("model: nothing-here\nmax-rows: 7\nmax_step_tokens: 5\n")
    outcome = Outcome(capfd, "serve", "--config", str(config))
    assert "max_step_tokens 5 is below max_rows 7" in outcome.err
    outcome = Outcome(capfd, "serve", "--config", str(config), "--max-rows", "6")
    assert "max_step_tokens 5 is below max_rows 6" in outcome.err
    outcome = Outcome(capfd, "serve", "--config", str(config), "--max-rows", "5", "--port", "0")
    assert "no model 'nothing-here'" in outcome.err
    outcome = Outcome(capfd, "serve", "nor-here", "--config", str(config), "--max-rows", "5", "--port", "0")
    assert "no model 'nor-here'" in outcome.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_row: 5", "unknown key 'max_row'; known are allow-origin, "),
        ("config: other.yaml", "unknown key 'config'"),
        ("tp: two", "--tp"),
        ("tp: 2.5", "--tp"),
        ("tp: null", "tp must be a text, a number or true or false, got None"),
        ("tp: {a: 1}", "tp must be a text, a number or true or false, got {'a': 1}"),
        ("sampling: maybe", "--sampling"),
        ("max-rows: 4\nmax_rows: 5", "the key 'max_rows' twice"),
        ("- tp", "must hold `key: value` lines"),
        ("tp: [1", "cannot be read"),
    ],
)
def test_a_bad_file_is_explained(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(content)
    outcome = Outcome(capfd, "serve", "smollm2", "--config", str(config))
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err


def test_a_missing_file_is_explained(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = Outcome(capfd, "serve", "smollm2", "--config", str(tmp_path / "none.yaml"))
    assert outcome.code == 2
    assert "cannot be read" in outcome.err


def test_lists_and_booleans_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text("chat: true\nstop: [a, 5]\ntop-p: 0.5\n")
    known = ("chat", "stop", "top_p")
    assert read_flags(config, known) == {"chat": "True", "stop": ["a", "5"], "top_p": "0.5"}
    config.write_text("")
    assert read_flags(config, known) == {}


@pytest.mark.parametrize("origins", ["localhost:3000", "[http://a.example, localhost:3000]"])
def test_a_repeatable_flag_is_one_value_or_a_list_in_a_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, origins: str
) -> None:
    config = tmp_path / "flags.yaml"
    config.write_text(f"allow-origin: {origins}\n")
    outcome = Outcome(capfd, "serve", "nothing-here", "--config", str(config), "--port", "0")
    assert outcome.code == 2
    assert "allow_origin must be * or an origin" in outcome.err
    assert "got 'localhost:3000'" in outcome.err


def test_bench_host_prints_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(capfd, "bench", "host", "--rows", "2", "--rows", "4", "--steps", "5")
    assert outcome.code == 0
    header, *rows = outcome.out.splitlines()
    assert header.split()[0] == "rows"
    assert [row.split()[0] for row in rows] == ["2", "4"]


def test_a_dtype_that_is_not_known_is_refused_with_those_that_are(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "flags.yaml").write_text("dtype: float16")
    for flags in (["--dtype", "float16"], ["--config", str(tmp_path / "flags.yaml")]):
        outcome = Outcome(capfd, "serve", "nothing-here", *flags)
        assert outcome.code == 2
        assert "dtype must be one of ['auto', 'float32', 'bfloat16'], got 'float16'" in outcome.err
