"""Times of a step: by hand, and laws of collectives, hosts and sampling."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import Dtype, SamplingMode
from albireo_jax.core.memory import weight_bytes
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.sim.gpus import GPUS, find_gpu
from albireo_jax.sim.host import NO_HOST, OWN_HOST, host_terms, read_host_terms
from albireo_jax.sim.planning.calibration import (
    BucketTerms,
    Calibration,
    LoopTerms,
    SamplingTerms,
    Shard,
    StepTable,
)
from albireo_jax.sim.step_model import (
    Efficiency,
    StepModel,
    calibrated_model,
    measured_limits,
    roofline_model,
    sampler_terms,
    sampling_cost,
)
from benchmarks.studies.simulated_te import decode_step

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=32_000,
    max_position=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
H100 = GPUS["h100"]
RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/host-cpu-amd-epyc-2-20261123-0339.json"


def decode(rows: int, *, context: int = 99) -> StepPlan:
    return decode_step(rows, context=context)


def test_one_decode_step_by_hand() -> None:
    """8 rows at 100 tokens each on two H100s, of which half the bandwidth is reached."""
    steps = roofline_model(
        MODEL,
        H100,
        tp=2,
        host=NO_HOST,
        mode=SamplingMode.SHARDED,
        efficiency=Efficiency(flops=1.0, memory=0.5),
    )
    embedding = 16_000 * 512 * 2
    weights = weight_bytes(MODEL, tp=2, dtype=Dtype.BFLOAT16) - embedding
    token = 2 * 4 * 4 * 64 * 2  # keys and values of 4 layers and 4 of 8 heads
    logits = 2 * 4 * 8 * 16_000
    local_s = (weights + 8 * 101 * token + logits) / (0.5 * 3.35e12)
    reduce_s = 7.4e-6 + 8 * 512 * 2 / 340e9  # 2 (t - 1) / t of the bytes
    assert steps.forward(decode(8)) == pytest.approx(local_s + 9 * reduce_s)
    exchange_s = 7.4e-6 + 0.5 * 4 * 32_000 * 4 / 340e9
    sample_s = 4 * 3 * 4 * 32_000 / (0.5 * 3.35e12)
    ids_s = 7.4e-6 + 0.5 * 8 * 4 / 340e9
    assert steps.sampling(decode(8)) == pytest.approx(exchange_s + sample_s + ids_s)
    assert steps.label == "simulated (roofline)"


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_collectives_take_longer_for_more_bytes_and_more_ranks_and_nothing_alone(gpu) -> None:
    links = gpu.links
    for seconds in (links.all_reduce_s, links.all_gather_s, links.all_to_all_s):
        assert seconds(1e6, ranks=1) == 0
        sizes = [seconds(size, ranks=4) for size in (0, 1e3, 1e6, 1e9)]
        assert sizes == sorted(sizes)
        assert sizes[0] > 0
        ranks = [seconds(1e6, ranks=count) for count in (2, 4, 8)]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("ranks", "mib", "measured_us"),
    [(4, 0.5, 17), (4, 1, 19), (4, 2, 26), (4, 4, 37), (8, 0.5, 24), (8, 2, 37), (8, 4, 50), (8, 32, 195)],
)
def test_all_reduces_of_h100s_are_near_what_was_measured(ranks: int, mib: float, measured_us: float) -> None:
    assert H100.links.all_reduce_s(mib * 2**20, ranks=ranks) == pytest.approx(measured_us * 1e-6, rel=0.15)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_sharded_sampling_is_a_share_of_replicated(tp: int) -> None:
    terms = sampler_terms(MODEL, Efficiency().of(H100))
    free = dataclasses.replace(H100.links, hop_s=0.0, bytes_per_s=1e30)
    replicated, sharded = (
        sampling_cost(terms, MODEL, free, tp=tp, mode=mode)
        for mode in (SamplingMode.REPLICATED, SamplingMode.SHARDED)
    )
    assert sharded(decode(128)) == pytest.approx(replicated(decode(128)) / tp)
    assert sharded(decode(1)) == pytest.approx(replicated(decode(1)))  # rows are not cut


def test_a_step_that_samples_nothing_takes_no_sampling() -> None:
    chunk = dataclasses.replace(decode(4), samples=np.zeros(4, np.bool_))
    for mode in SamplingMode:
        steps = roofline_model(MODEL, H100, tp=4, host=NO_HOST, mode=mode)
        assert steps.sampling(chunk) == 0


def test_more_of_the_data_sheet_is_never_slower() -> None:
    slow, fast = (
        roofline_model(
            MODEL,
            H100,
            tp=4,
            host=NO_HOST,
            mode=SamplingMode.SHARDED,
            efficiency=Efficiency(flops=share, memory=share),
        )
        for share in (0.4, 0.8)
    )
    for rows in (1, 16, 256):
        assert fast.forward(decode(rows)) < slow.forward(decode(rows))


def test_what_ships_of_the_host_is_the_record() -> None:
    fitted = host_terms(json.loads(RECORD.read_text()))
    for rows in (32, 128, 512):
        assert OWN_HOST.step_s(decode(rows)) == pytest.approx(fitted.step_s(decode(rows)), rel=0.03)
    assert "AMD EPYC" in fitted.source


def test_other_files_are_no_record_of_the_host(tmp_path: Path) -> None:
    for text in ("{}", "[]", "no json", '{"name": "swap"}'):
        path = tmp_path / "record.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"record\.json is no record of the host's work"):
            read_host_terms(path)


def test_an_unknown_gpu_is_answered_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"'v100' is not known; known are h100, .*a100-pcie"):
        find_gpu("v100")


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_no_kernel_reaches_more_than_all(share: float) -> None:
    with pytest.raises(ValueError, match="efficiency must be above 0 and at most 1"):
        Efficiency(memory=share)


def calibration(*, is_shard_shaped: bool) -> Calibration:
    """Steps of two sizes, measured for a rank of two."""
    steps = StepTable(
        buckets=(
            BucketTerms(tokens=8, rows=8, step_s=1e-3, samples=5),
            BucketTerms(tokens=64, rows=8, step_s=3e-3, samples=5),
            BucketTerms(tokens=64, rows=64, step_s=2e-3, samples=0),
        ),
        row_pair_s=1e-7,
        chunk_pair_s=1e-8,
    )
    shard = Shard(
        tp=2,
        is_shard_shaped=is_shard_shaped,
        loops=(LoopTerms(depth=2, steps=steps, host=OWN_HOST),),
        sampling=SamplingTerms(rows=(8, 64), greedy_s=(1e-5, 2e-5), filtered_s=(1e-4, 4e-4)),
    )
    return Calibration(model="m", dtype="bfloat16", device="a GPU", source="a test", shards=(shard,))


def calibrated(measured: Calibration, mode: SamplingMode) -> StepModel:
    return calibrated_model(measured, MODEL, H100, tp=2, depth=2, mode=mode)


def test_collectives_are_added_to_what_one_device_measured_and_to_nothing_else() -> None:
    step = decode(8)
    local_s = 1e-3 + 1e-7 * 8 * 100
    whole = calibrated(calibration(is_shard_shaped=False), SamplingMode.SHARDED)
    assert whole.forward(step) == pytest.approx(local_s)
    assert whole.sampling(step) == 1e-4
    shard = calibrated(calibration(is_shard_shaped=True), SamplingMode.SHARDED)
    reduce_s = H100.links.all_reduce_s(8 * 512 * 2, ranks=2)
    assert shard.forward(step) == pytest.approx(local_s + 9 * reduce_s)
    assert shard.sampling(step) > 1e-4
    everywhere = calibrated(calibration(is_shard_shaped=True), SamplingMode.REPLICATED)
    assert everywhere.sampling(step) > 2e-4
    assert shard.label == "simulated (measured on a GPU)"
    assert any("assumed and not measured" in source for source in shard.sources)


def test_steps_that_were_not_measured_are_told() -> None:
    measured = calibration(is_shard_shaped=True)
    steps = calibrated(measured, SamplingMode.SHARDED)
    assert not steps.is_extrapolated(decode(8))
    assert steps.is_extrapolated(decode(9))
    assert measured_limits(measured, depth=2) == (64, 64)
    with pytest.raises(ValueError, match="a step of 65 tokens and 65 rows is larger than those measured"):
        steps.forward(decode(65))
    with pytest.raises(ValueError, match="depth 1 was not measured"):
        measured_limits(measured, depth=1)
    with pytest.raises(ValueError, match="tp 4 was not measured"):
        calibrated_model(measured, MODEL, H100, tp=4, depth=2, mode=SamplingMode.SHARDED)
