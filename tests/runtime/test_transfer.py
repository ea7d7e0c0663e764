"""Pages that move between the devices and the host: against a model of both tiers, and within an engine."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from albireo_jax.core.config import KvDtype
from albireo_jax.core.plan import PageCopies, SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY
from albireo_jax.nn.sharding import TP, make_mesh
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.runtime.compile import compile_all
from albireo_jax.runtime.handles import PolledArrays, StepCopies
from albireo_jax.runtime.state import StateShape, kv_specs, plan_state
from albireo_jax.runtime.transfer import COPIES, HostPages

Build = Callable[..., Any]
NUM_PAGES, NUM_HOST_PAGES, PAGE_SIZE = 60, 50, 2
PAGES = list(range(1, NUM_PAGES + 1))
KINDS = [KvDtype.FLOAT32, KvDtype.INT8]
WAYS = [(tp, kind) for tp in (1, 4) for kind in KINDS]


class Tiers(NamedTuple):
    """Pages of both tiers in NumPy: per field of the cache, an array with the pages first."""

    device: list[np.ndarray]
    host: list[np.ndarray]


def _empty(tp: int, kind: KvDtype, num_pages: int = NUM_PAGES) -> KvCache:
    shape = StateShape(
        num_layers=2,
        num_pages=num_pages + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=4,
        head_dim=4,
        num_slots=1,
        pages_per_slot=1,
    )
    return plan_state(shape, make_mesh(tp), axis=TP, kv_dtype=kind).make().cache.kv


def _random(draw: np.random.Generator, kv: KvCache) -> KvCache:
    """A cache of random contents, placed as `kv` is."""

    def fill(array: jax.Array) -> jax.Array:
        return jax.device_put(draw.integers(-99, 99, array.shape).astype(array.dtype), array.sharding)

    return jax.tree.map(fill, kv)


@cache
def _compiled(tp: int, kind: KvDtype) -> Any:
    return compile_all(_uncompiled(tp, kind).programs())


def _uncompiled(tp: int, kind: KvDtype, num_host_pages: int = NUM_HOST_PAGES) -> HostPages:
    return HostPages(_empty(tp, kind), make_mesh(tp), axis=TP, num_host_pages=num_host_pages)


def _host_pages(tp: int, kind: KvDtype) -> HostPages:
    pages = _uncompiled(tp, kind)
    pages.use(_compiled(tp, kind))
    return pages


def _pages_first(kv: KvCache) -> list[np.ndarray]:
    return [np.array(array).swapaxes(0, 1) for array in jax.tree.leaves(kv)]


def _distinct(draw: np.random.Generator, pages: list[int], count: int) -> list[int]:
    return draw.permutation(pages)[:count].tolist()


def _check(kv: KvCache, tiers: Tiers) -> None:
    for got, want in zip(_pages_first(kv), tiers.device, strict=True):
        np.testing.assert_array_equal(got[1:], want[1:])


@pytest.mark.parametrize(("tp", "kind"), WAYS)
def test_random_copies_equal_a_model_of_both_tiers(tp: int, kind: KvDtype, compilations: list[str]) -> None:
    draw = np.random.default_rng(tp)
    pages, kv = _host_pages(tp, kind), _random(draw, _empty(tp, kind))
    device = _pages_first(kv)
    tiers = Tiers(device, [np.zeros_like(array[: NUM_HOST_PAGES + 1]) for array in device])
    held: set[int] = set()
    arriving: list[tuple[int, list[np.ndarray]]] = []
    going = coming = 0
    compilations.clear()
    for step in range(25):
        count = int(draw.choice([0, 1, 3, COPIES, NUM_HOST_PAGES]))
        hosts = _distinct(draw, list(range(1, NUM_HOST_PAGES + 1)), count)
        to_host = tuple(zip(_distinct(draw, PAGES, count), hosts, strict=True))
        held |= set(hosts)
        wanted = _distinct(draw, sorted(held), int(draw.choice([0, 2, 7, 40])))
        to_device = tuple(zip(wanted, _distinct(draw, PAGES, len(wanted)), strict=True))
        kv = pages.run(kv, PageCopies(to_host=to_host, to_device=to_device)).kv

        for page, contents in arriving:
            for array, content in zip(tiers.device, contents, strict=True):
                array[page] = content
        for page, host in to_host:
            for device_array, host_array in zip(tiers.device, tiers.host, strict=True):
                host_array[host] = device_array[page]
        arriving = [(page, [array[host].copy() for array in tiers.host]) for host, page in to_device]
        going, coming = going + len(to_host), coming + len(to_device)
        if step % 5 == 4:
            _check(kv, tiers)
    assert len(compilations) == 0
    page_bytes = sum(array[0].nbytes for array in tiers.device)
    assert pages.copied == (going * page_bytes, coming * page_bytes)


@pytest.mark.parametrize(("tp", "kind"), WAYS)
def test_pages_go_out_are_overwritten_and_come_back_bit_equal(tp: int, kind: KvDtype) -> None:
    draw = np.random.default_rng(0)
    pages, first = _host_pages(tp, kind), _random(draw, _empty(tp, kind))
    want = _pages_first(first)
    pages.copy_out(first, tuple((page, page) for page in range(1, NUM_HOST_PAGES + 1)))
    other = _random(draw, first)
    others = _pages_first(other)
    pages.start_copy_in([(7, 3), (8, 4)])
    got = _pages_first(pages.finish_copy_in(other))
    for array, old, new in zip(got, want, others, strict=True):
        np.testing.assert_array_equal(array[[3, 4]], old[[7, 8]])
        np.testing.assert_array_equal(np.delete(array, [3, 4], axis=0), np.delete(new, [3, 4], axis=0))


@pytest.mark.parametrize(("tp", "kind"), WAYS)
def test_a_host_page_may_be_copied_to_as_soon_as_its_copy_in_has_started(tp: int, kind: KvDtype) -> None:
    draw = np.random.default_rng(0)
    pages, first = _host_pages(tp, kind), _random(draw, _empty(tp, kind))
    second = _random(draw, first)
    pages.copy_out(first, [(5, 1)])
    pages.start_copy_in([(1, 9)])
    pages.copy_out(second, [(6, 1)])
    pages.start_copy_in([(1, 10)])
    want = [_pages_first(first), _pages_first(second)]
    got = _pages_first(pages.finish_copy_in(second))
    for array, old, new in zip(got, *want, strict=True):
        np.testing.assert_array_equal(array[9], old[5])
        np.testing.assert_array_equal(array[10], new[6])


@pytest.mark.parametrize(("tp", "kind"), WAYS)
def test_host_pages_are_pinned_and_split_like_the_cache(tp: int, kind: KvDtype) -> None:
    pages, kv = _host_pages(tp, kind), _random(np.random.default_rng(0), _empty(tp, kind))
    (page,) = pages.copy_out(kv, [(1, 1)])
    for array, whole, spec in zip(*map(jax.tree.leaves, (page, kv)), kv_specs(TP), strict=False):
        assert isinstance(array.sharding, NamedSharding)
        assert array.sharding.memory_kind == "pinned_host"
        assert array.nbytes * (NUM_PAGES + 1) == whole.nbytes
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // tp}
        assert array.sharding.spec[2] == spec[3] == TP


@pytest.mark.parametrize(("tp", "kind"), WAYS)
def test_the_cache_is_written_in_place(tp: int, kind: KvDtype) -> None:
    kv = _empty(tp, kind, num_pages=6000)
    pool_bytes = sum(array.nbytes for array in jax.tree.leaves(kv)) // tp
    pages = HostPages(kv, make_mesh(tp), axis=TP, num_host_pages=NUM_HOST_PAGES)
    largest = {program: lower for program, lower in pages.programs().items() if program.pages == COPIES}
    assert len(largest) == 2
    for program, lower in largest.items():
        memory = lower().compile().memory_analysis()
        assert memory.temp_size_in_bytes < pool_bytes / 8
        assert memory.alias_size_in_bytes == (pool_bytes if "write" in program.kind else 0)


def test_one_host_page_may_go_to_more_pages_than_there_are_host_pages() -> None:
    kv = _random(np.random.default_rng(0), _empty(1, KvDtype.INT8))
    want = _pages_first(kv)
    pages = _uncompiled(1, KvDtype.INT8, num_host_pages=3)
    pages.use(compile_all(pages.programs()))
    pages.copy_out(kv, [(2, 3)])
    pages.start_copy_in([(3, page) for page in range(11, 20)])
    for got, old in zip(_pages_first(pages.finish_copy_in(kv)), want, strict=True):
        assert (got[11:20] == old[2]).all()
        np.testing.assert_array_equal(np.delete(got, range(11, 20), axis=0), np.delete(old, range(11, 20), 0))


def test_without_host_pages_there_are_no_programs() -> None:
    pages, kv = _uncompiled(1, KvDtype.FLOAT32, num_host_pages=0), _empty(1, KvDtype.FLOAT32)
    assert pages.programs() == {}
    assert pages.run(kv, PageCopies()) == (kv, [], StepCopies())


def test_pages_that_are_not_there_are_our_bug() -> None:
    pages, kv = _host_pages(1, KvDtype.FLOAT32), _empty(1, KvDtype.FLOAT32)
    with pytest.raises(AssertionError, match="1 copies, but there are no host pages"):
        _uncompiled(1, KvDtype.FLOAT32, num_host_pages=0).copy_out(kv, [(1, 1)])
    for pair in ((0, 1), (NUM_PAGES + 1, 1), (1, 0), (1, NUM_HOST_PAGES + 1)):
        with pytest.raises(AssertionError, match="page"):
            pages.copy_out(kv, [pair])
    with pytest.raises(KeyError):
        pages.start_copy_in([(1, 1)])


SLOT = SlotParams(slot=0, sampling=GREEDY, banned_until=0, stop_ids=())
PROMPT = (5, 6, 7, 8, 9, 10, 11)
NONE = np.zeros(0, np.int32)
COPIES_ONLY = StepPlan(
    step=0,
    request_ids=(),
    epochs=NONE,
    slots=NONE,
    starts=NONE,
    counts=NONE,
    samples=np.zeros(0, np.bool_),
    token_ids=NONE,
    update_slots=NONE,
    update_columns=NONE,
    update_pages=NONE,
)


def _step(tokens: tuple[int, ...], *, start: int = 0, slot: int = 0, pages: tuple[int, ...] = ()) -> StepPlan:
    """A step of one row that samples; a row that starts at 0 is a new request's."""
    return replace(
        COPIES_ONLY,
        request_ids=("r",),
        epochs=np.ones(1, np.int32),
        slots=np.array([slot], np.int32),
        starts=np.array([start], np.int32),
        counts=np.array([len(tokens)], np.int32),
        samples=np.array([True]),
        token_ids=np.array(tokens, np.int32),
        update_slots=np.full(len(pages), slot, np.int32),
        update_columns=np.arange(len(pages), dtype=np.int32),
        update_pages=np.array(pages, np.int32),
        new_slots=(replace(SLOT, slot=slot),) if start == 0 else (),
    )


@pytest.mark.parametrize(("tp", "kind"), [(1, KvDtype.FLOAT32), (4, KvDtype.INT8)])
def test_a_request_swapped_out_and_in_samples_what_it_would_have(
    engine: Build, tp: int, kind: KvDtype, compilations: list[str]
) -> None:
    """Its two pages of 4 tokens leave while another request writes over them, and come back elsewhere."""
    executor = engine(tp=tp, kv_dtype=kind, num_host_pages=4).executor
    after = _step((12, 13, 14), start=len(PROMPT), pages=(1, 2, 5))
    executor.dispatch(_step(PROMPT, pages=(1, 2)))
    want = executor.dispatch(after).wait().ids.tolist()
    executor.dispatch(_step(PROMPT, pages=(1, 2))).wait()
    compilations.clear()

    out = PageCopies(to_host=((1, 3), (2, 1)))
    other = _step(tuple(range(40, 60)), slot=1, pages=(2, 1, 7, 8, 9))
    overwriting = executor.dispatch(replace(other, copies=out))
    copies_in = PageCopies(to_device=((3, 11), (1, 12)))
    only = executor.dispatch(replace(COPIES_ONLY, copies=copies_in))
    back = executor.dispatch(replace(after, update_pages=np.array((11, 12, 5), np.int32)))
    assert overwriting.wait().ids.shape == (1,)
    assert only.wait().ids.tolist() == []
    assert back.wait().ids.tolist() == want
    assert len(compilations) == 0


def test_what_comes_back_to_the_pages_it_left_is_there_from_the_next_step_on(engine: Build) -> None:
    def run(copies: PageCopies) -> list[int]:
        """The token after the prompt and each of some others; a step in between writes over its pages."""
        ids: list[int] = []
        for token in range(20, 25):
            executor.dispatch(_step(PROMPT, pages=(1, 2)))
            executor.dispatch(replace(_step(tuple(range(40, 48)), slot=1, pages=(1, 2)), copies=copies))
            ids += executor.dispatch(_step((token,), start=len(PROMPT))).wait().ids.tolist()
        return ids

    executor = engine(num_host_pages=4).executor
    lost = run(PageCopies(to_host=((1, 1), (2, 2))))
    moved = run(PageCopies(to_host=((1, 4), (2, 3)), to_device=((4, 1), (3, 2))))
    alone = [
        executor.dispatch(_step((*PROMPT, token), pages=(1, 2))).wait().ids.item() for token in range(20, 25)
    ]
    assert moved == alone
    assert lost != alone


def _watched(unready_s: float, ready_s: float | None) -> PolledArrays:
    watched = PolledArrays([])
    watched.unready_s, watched.ready_s = unready_s, ready_s
    return watched


@pytest.mark.parametrize(
    ("needed", "computing_s", "wait_s"),
    [
        (None, 0.0, 0.0),
        (None, 2.0, 2.0),
        (_watched(9.0, 14.0), 0.0, 0.0),  # it may have come before the step could begin
        (_watched(10.0, 14.0), 0.0, 4.0),
        (_watched(13.0, 14.0), 2.0, 6.0),
        (_watched(19.0, None), 0.0, 10.0),  # a step does not end before what it needs has come
        (_watched(13.0, 19.0), 2.0, 10.0),
    ],
)
def test_what_a_step_waits_for_its_copies(
    needed: PolledArrays | None, computing_s: float, wait_s: float
) -> None:
    copies = StepCopies(needed=needed, computing_s=computing_s)
    assert copies.wait_s(10.0, 20.0) == wait_s
    assert copies.wait_s(30.0, 20.0) == 0.0


def test_an_array_is_seen_ready_once_it_is() -> None:
    began_s = time.perf_counter()
    watched = PolledArrays([jax.jit(lambda x: x @ x)(jax.numpy.ones((256, 256)))])
    assert watched.ready_s is None or watched.poll()
    assert began_s < watched.unready_s <= watched.wait() <= time.perf_counter()
    assert watched.poll()
    assert watched.ready_s is not None
    assert watched.wait() == watched.unready_s <= watched.ready_s
