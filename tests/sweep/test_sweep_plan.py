"""The cases of a sweep, its load, and what it refuses before anything starts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.measure.loads import (
    FixedBatch,
    OfferedLoad,
    PoissonLoad,
    TraceLoad,
    cluster_arrivals,
    deal,
    digest,
    sampled_requests,
)
from albireo_jax.sweep.cases import MemoryRule, SweepPlan, plan_sweep
from albireo_jax.sweep.sweep_settings import SweepSettings, Variant, engine_samplings

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=64,
    intermediate_size=172,  # not divisible by 8
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=512,
    max_position=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
BATCH = FixedBatch(per_gpu=4, input_len=24, output_len=8)
SETTINGS = SweepSettings(
    model="model",
    gpus=8,
    degrees=(1, 2, 4),
    load=BATCH,
    one_replica=True,
    interleaved=True,
    virtual_devices=8,
    rows_per_gpu=4,
)
TRACE = """arrived_at,input_tokens,output_tokens,block_size,blocks
5.0,100,10,0,
6.0,40,30,0,
9.0,8,8,0,
"""


def plan(settings: SweepSettings, *, device_memory_bytes: int | None = None) -> SweepPlan:
    arrivals = tuple(cluster_arrivals(settings.load, gpus=settings.gpus, seed=0))
    return plan_sweep(settings, MODEL, arrivals, device_memory_bytes=device_memory_bytes)


@pytest.mark.parametrize("interleaved", [True, False])
def test_every_degree_and_variant_is_measured_once(interleaved: bool) -> None:
    cases = plan(replace(SETTINGS, interleaved=interleaved)).cases
    measured = [(case.tp, variant) for case in cases for variant in case.variants]
    assert measured == [(tp, variant) for tp in (1, 2, 4) for variant in Variant]
    assert len({case.name for case in cases}) == len(cases) == (3 if interleaved else 9)
    for case in cases:
        assert case.tp * case.num_replicas == 8
        assert case.max_rows == 4 * case.tp
        assert case.max_model_len == 32


def test_how_a_cluster_was_measured_is_said() -> None:
    assert [case.how for case in plan(SETTINGS).cases] == [
        "one of 8 replicas measured, times 8; 1 virtual device shares the machine's cores",
        "one of 4 replicas measured, times 4; 2 virtual devices share the machine's cores",
        "one of 2 replicas measured, times 2; 4 virtual devices share the machine's cores",
    ]
    together = plan(replace(SETTINGS, degrees=(4,), one_replica=False)).cases[0]
    assert together.measured_replicas == 2
    assert together.how == (
        "all 2 replicas measured side by side, summed; 8 virtual devices share the machine's cores"
    )
    gpus = replace(SETTINGS, virtual_devices=0, interleaved=False, one_replica=False, degrees=(2,))
    assert plan(gpus, device_memory_bytes=2**30).cases[0].how == (
        "all 4 replicas measured side by side, summed"
    )


def test_variants_add_one_thing_each() -> None:
    assert [(variant.depth, variant.sampling) for variant in Variant] == [
        (1, SamplingMode.REPLICATED),
        (2, SamplingMode.REPLICATED),
        (2, SamplingMode.SHARDED),
    ]
    assert engine_samplings(tuple(Variant), tp=1) == (SamplingMode.SHARDED,)
    assert engine_samplings(tuple(Variant), tp=2) == (SamplingMode.REPLICATED, SamplingMode.SHARDED)


@given(items=st.lists(st.integers()), replicas=st.sampled_from((1, 2, 4, 8)))
def test_dealing_loses_nothing_and_keeps_the_order(items: list[int], replicas: int) -> None:
    shares = deal(list(enumerate(items)), replicas)
    assert len(shares) == replicas
    assert sorted(item for share in shares for item in share) == list(enumerate(items))
    for replica, share in enumerate(shares):
        assert [index for index, _ in share] == list(range(replica, len(items), replicas))


def test_a_batch_gives_each_replica_its_gpus_share() -> None:
    arrivals = cluster_arrivals(FixedBatch(per_gpu=32, input_len=5, output_len=6), gpus=8, seed=0)
    for tp in (1, 2, 4, 8):
        assert {len(share) for share in deal(arrivals, 8 // tp)} == {32 * tp}
    assert {(one.arrived_s, one.input_tokens, one.output_tokens) for one in arrivals} == {(0.0, 5, 6)}


def test_a_trace_begins_at_once_and_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    arrivals = cluster_arrivals(TraceLoad(path=path, scale=0.5, rate_scale=2.0, count=2), gpus=8, seed=0)
    assert [(one.arrived_s, one.input_tokens, one.output_tokens) for one in arrivals] == [
        (0.0, 50, 5),
        (0.5, 20, 15),
    ]
    assert len(cluster_arrivals(TraceLoad(path=path), gpus=8, seed=0)) == 3


def test_poisson_arrivals_have_the_rate_and_depend_on_the_seed_only() -> None:
    load = PoissonLoad(rate_per_s=50.0, count=2000, input_len=5, output_len=6)
    arrivals = cluster_arrivals(load, gpus=8, seed=1)
    assert arrivals == cluster_arrivals(load, gpus=4, seed=1) != cluster_arrivals(load, gpus=8, seed=2)
    assert 2000 / arrivals[-1].arrived_s == pytest.approx(50.0, rel=0.1)
    assert digest(arrivals) != digest(cluster_arrivals(load, gpus=8, seed=2))


def test_requests_are_drawn_apart_and_the_same_at_every_degree() -> None:
    arrivals = cluster_arrivals(BATCH, gpus=2, seed=0)
    first, again, other = (
        sampled_requests(arrivals, vocab_size=100, seed=seed, temperature=0.8, top_p=0.9)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert (
        len({request.prompt_token_ids.tobytes() for request in first})
        == len({one.sampling.seed for one in first})
        == 8
    )
    assert first[0].prompt_token_ids.tolist() != other[0].prompt_token_ids.tolist()
    assert all(request.stop_ids == () for request in first)


@pytest.mark.parametrize(
    ("weight_gb", "expected"), [(14, 1), (26, 2), (64, 4), (140, 8)], ids=["7B", "13B", "32B", "70B"]
)
def test_the_rule_of_thumb_is_the_papers(weight_gb: int, expected: int) -> None:
    rule = MemoryRule(weight_bytes=weight_gb * 10**9, gpu_memory_bytes=80 * 10**9)
    assert rule.tp == expected
    assert rule.value == pytest.approx(4 * weight_gb / 80)
    unknown = MemoryRule(weight_bytes=1, gpu_memory_bytes=None)
    assert (unknown.value, unknown.tp) == (None, None)


def test_given_memory_decides_the_pages_and_what_fits() -> None:
    cases = plan(replace(SETTINGS, gpu_memory_bytes=2**20)).cases
    free = plan(SETTINGS).cases
    assert all(case.num_pages is not None for case in (*cases, *free))
    assert [case.num_pages for case in free] == [tp * 4 * 3 for tp in (1, 2, 4)]
    tight = replace(SETTINGS, degrees=(2, 4), gpu_memory_bytes=380_000)
    pages = [case.num_pages or 0 for case in plan(tight).cases]
    assert 2 <= pages[0] < pages[1]
    with pytest.raises(ValueError, match=r"does not fit at tp 1 .*; it fits at tp 2,4$"):
        plan(replace(tight, degrees=(1, 2)))
    with pytest.raises(ValueError, match=r"it fits at no degree, and at tp 4 in 0.000\d+ GiB$"):
        plan(replace(tight, gpu_memory_bytes=1000))


def test_memory_that_is_said_to_be_enough_is_enough() -> None:
    with pytest.raises(ValueError, match="it fits at no degree") as refused:
        plan(replace(SETTINGS, gpu_memory_bytes=1000))
    gib = float(str(refused.value).split()[-2])
    assert plan(replace(SETTINGS, degrees=(4,), gpu_memory_bytes=int(gib * 2**30))).cases[0].num_pages


def test_an_engine_that_is_told_of_no_memory_fills_its_gpu() -> None:
    gpus = replace(SETTINGS, virtual_devices=0, interleaved=False)
    assert plan(gpus, device_memory_bytes=2**30).cases[0].num_pages is None
    with pytest.raises(ValueError, match="does not fit at tp 1"):
        plan(gpus, device_memory_bytes=1000)


def changed(**fields: object) -> Callable[[], object]:
    return lambda: plan(replace(SETTINGS, **fields))


def load(kind: type[OfferedLoad], **fields: object) -> Callable[[], object]:
    return lambda: kind(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(degrees=(8,)), r"tp 8 does not divide this model .*; with 8 GPUs: 1,2,4"),
        (changed(degrees=(1, 16)), r"tp 16 needs 16 GPUs, the cluster has 8; .*: 1,2,4,8"),
        (changed(degrees=(3,)), r"tp must be one of \[1, 2, 4, 8\], got 3; possible with 8 GPUs: 1,2,4,8"),
        (changed(gpus=6, virtual_devices=6), r"6 GPUs cannot be divided into replicas of 4; .*: 1,2$"),
        (changed(degrees=()), "tp names no degree; possible with 8 GPUs: 1,2,4,8"),
        (changed(degrees=(1, 1)), "tp names a degree twice: 1,1"),
        (changed(gpus=0), "gpus must be at least 1, got 0"),
        (changed(repeats=0), "repeats must be at least 1, got 0"),
        (changed(warmups=-1), "warmups must not be negative, got -1"),
        (changed(temperature=-1.0), "temperature must be"),
        (changed(page_size=3), "page_size must be a power of two"),
        (changed(virtual_devices=9), "9 virtual devices are more than the 8 GPUs they stand for"),
        (changed(virtual_devices=2), "tp 4 needs 4 virtual devices, got 2"),
        (changed(virtual_devices=4, one_replica=False), "all replicas of 8 GPUs together needs 8"),
        (changed(virtual_devices=0), "say with --gpu-memory how much to share"),
        (
            changed(load=replace(BATCH, input_len=600)),
            r"longest request has 608 tokens, .* is 512; .* --scale 0.84 or less",
        ),
        (
            changed(load=PoissonLoad(rate_per_s=1.0, count=5, input_len=2, output_len=2)),
            "5 requests leave some of the 8 replicas of tp 1 without any; at least 8 are needed",
        ),
        (load(FixedBatch, per_gpu=0, input_len=1, output_len=1), "batch_per_gpu must be at least 1, got 0"),
        (load(PoissonLoad, rate_per_s=0.0, count=1, input_len=1, output_len=1), "rate must be .* got 0"),
        (load(TraceLoad, path=Path("x"), scale=0.0), "scale must be a finite number above 0, got 0"),
        (load(TraceLoad, path=Path("x"), count=0), "requests must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TRACE.splitlines()[0], "is empty: it needs at least one request"),
        ("", "cannot be read as a trace: it has no column arrived_at"),
        ("a,b\n1,2\n", "has no column arrived_at, input_tokens"),
        (TRACE.replace("100", "many"), "cannot be read as a trace"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        cluster_arrivals(TraceLoad(path=path), gpus=1, seed=0)
