"""`albireo calibrate` writes what `albireo plan --calibration` reads, a shard for each degree."""

import json
from pathlib import Path

import pytest

from albireo_jax.cli import main
from albireo_jax.sim.planning.calibration import read_calibration

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}
SIZES = ("--max-rows", "2", "--max-step-tokens", "16", "--max-model-len", "64", "--depths", "1")


def run(*arguments: str) -> object:
    """The exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        main(("calibrate", *arguments))
    return ended.value.code


@pytest.mark.compiles
def test_each_degree_is_measured_on_one_device(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    output = tmp_path / "calibration.json"
    asked = (str(tmp_path), "--shard-shaped", "--tp", "1,2", "--repeats", "1", "--output", str(output))
    assert run(*asked, *SIZES) in (0, None)
    calibration = read_calibration(output)
    assert [(shard.tp, shard.is_shard_shaped) for shard in calibration.shards] == [(1, True), (2, True)]
    assert calibration.source.startswith("albireo calibrate")
    for shard in calibration.shards:
        (loop,) = shard.loops
        assert loop.depth == 1
        assert any(bucket.samples > 0 for bucket in loop.steps.buckets)
    told = capfd.readouterr().out
    assert "t = 2, depth 1" in told
    assert told.splitlines()[-1] == str(output)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--tp", "1,two"), "--tp takes numbers and commas, such as 64,128; got '1,two'"),
        (("--tp", "1", "--repeats", "0"), "repeats must be at least 1, got [0]"),
        (("--tp", "8"), "tp 8 does not divide this model"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: tuple[str, ...], message: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    assert run(str(config), *asked, "--output", str(tmp_path / "unwritten.json")) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "unwritten.json").exists()
