"""Pages in the host's pinned memory, and the copies between them and the pages on the devices.

A page moves whole, all layers at once, and no call waits. A step dispatches, in this order::

    finish copies in   a program writes the pages that the step before sent for into the donated cache
    copy out           a program reads pages into arrays of their own, and one device_put moves these
    start copies in    one device_put moves host pages to the devices
    forward            overlaps the copies of both directions

    step            N                    N + 1
    devices  [read][ forward ....... ][write][ forward ....... ]
    out            └─ to host ─┘
    in       └──── to devices ────┘          ▲ valid from here on

Arrays never change, so both pages of a pair may be given to others in the next plan: the one on the devices
is read before anything later writes it, and the array of the one on the host lives on until it is copied.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32, Real

from albireo_jax.core.plan import Int32s, PageCopies
from albireo_jax.nn.sharding import shardings
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.runtime.handles import PolledArrays, StepCopies
from albireo_jax.runtime.state import kv_specs

COPIES = 32
"""Pages that one program reads or writes at most; a longer list takes several calls."""

_HOST = "pinned_host"
_TIMED_REPEATS = 6

_Item = TypeVar("_Item")


class PageArrays(NamedTuple):
    """One page of all layers: the fields of a `KvCache` without their axis P."""

    k_LSNK: Real[Array, "L S N K"]
    v_LSNK: Real[Array, "L S N K"]
    k_scale_LSN: Float[Array, "L S N"] | None
    v_scale_LSN: Float[Array, "L S N"] | None


class CopiedBytes(NamedTuple):
    """Bytes copied from the devices to the host, and from the host to the devices."""

    to_host: int
    to_devices: int


class StartedCopies(NamedTuple):
    """The cache, in which the copies of the step before have arrived, and the arrays now on their way."""

    kv: KvCache
    moving: list[PageArrays]
    copies: StepCopies


class PageTimes(NamedTuple):
    """Seconds of a page: to be read on the devices and leave them, to arrive on them and be written there."""

    read_s: float = 0.0
    leave_s: float = 0.0
    arrive_s: float = 0.0
    write_s: float = 0.0


class MeasuredCopy(NamedTuple):
    """The cache after copies that were timed, and what a page took."""

    kv: KvCache
    times: PageTimes


class CopyKind(StrEnum):
    """Programs that copy KV pages between the device and the host."""

    READ = "read pages"
    WRITE = "write pages"


@dataclass(frozen=True, slots=True)
class CopyProgram:
    """Key of a copy program for so many `pages`; a shorter list is padded by repeating its last page."""

    kind: CopyKind
    pages: int


class HostPages:
    """Pages 1 … `num_host_pages` of the host tier, and the copies to and from the pages of `kv`.

    A host page takes memory from the first time that it is copied to, and its last contents stay until it is
    copied to again. On the devices, beside the cache, copies in stand from one step to the next, and copies
    out until they have left. 0 pages take no programs.
    """

    def __init__(self, kv: KvCache, mesh: Mesh, *, axis: str, num_host_pages: int) -> None:
        self._mesh = mesh
        self._axis = axis
        self._kv = jax.tree.map(_shape_of, kv)
        self._num_pages = kv.k_LPSNK.shape[1]
        self._page_bytes = (
            sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(kv)) // self._num_pages
        )
        self._num_host_pages = num_host_pages
        self._batch = min(COPIES, _padded(num_host_pages))
        self._on_devices: PageArrays = shardings(mesh, _page_specs(axis))
        self._on_host = PageArrays(*(sharding.with_memory_kind(_HOST) for sharding in self._on_devices))  # type: ignore[attr-defined]
        self._held: dict[int, PageArrays] = {}
        self._arriving: list[tuple[int, PageArrays]] = []
        self._compiled: Mapping[Any, jax.stages.Compiled] = {}
        self._num_copied = [0, 0]  # pages to the host, pages to the devices
        self._sent: PolledArrays | None = None
        self._times = PageTimes()

    def programs(self) -> dict[CopyProgram, Callable[[], jax.stages.Lowered]]:
        """All programs, ready to be lowered; none if there are no host pages."""
        sizes = range(self._batch.bit_length())
        lower = {CopyKind.READ: self._lower_read, CopyKind.WRITE: self._lower_write}
        return {CopyProgram(kind, 2**n): partial(lower[kind], 2**n) for kind in CopyKind for n in sizes}

    def use(self, compiled: Mapping[Any, jax.stages.Compiled]) -> None:
        """Run these executables of `programs` from now on."""
        self._compiled = compiled

    @property
    def copied(self) -> CopiedBytes:
        """Bytes copied each way so far, of all ranks together."""
        return CopiedBytes(*(pages * self._page_bytes for pages in self._num_copied))

    def run(self, kv: KvCache, copies: PageCopies) -> StartedCopies:
        """Dispatch all copies that come before a step's forward pass, in their order; donates `kv`."""
        needed, num_written = self._sent, len(self._arriving)
        kv = self.finish_copy_in(kv)
        going = self.copy_out(kv, copies.to_host)
        coming = self.start_copy_in(copies.to_device)
        self._sent = PolledArrays(jax.tree.leaves(coming)) if coming else None
        times = self._times
        computing_s = times.read_s * len(going) + times.write_s * num_written
        alone_s = computing_s + times.leave_s * len(going) + times.arrive_s * len(coming)
        step = StepCopies(needed=needed, sent=self._sent, alone_s=alone_s, computing_s=computing_s)
        return StartedCopies(kv, going + coming, step)

    def measure(self, kv: KvCache) -> MeasuredCopy:
        """Time the parts of copies, as many as one program takes; overwrites page 1 of both tiers."""
        trials: list[PageTimes] = []
        for _ in range(_TIMED_REPEATS):
            moments_s = [time.perf_counter()]
            read = jax.block_until_ready(self._read(kv, [1] * self._batch))
            moments_s.append(time.perf_counter())
            self._held[1] = jax.block_until_ready(self._send_to_host(read))[0]
            moments_s.append(time.perf_counter())
            jax.block_until_ready(self.start_copy_in([(1, 1)] * self._batch))
            moments_s.append(time.perf_counter())
            kv = jax.block_until_ready(self.finish_copy_in(kv))
            moments_s.append(time.perf_counter())
            trials.append(PageTimes(*((end - begin) / self._batch for begin, end in pairwise(moments_s))))
        self._num_copied = [0, 0]
        self._times = PageTimes(*map(statistics.median, zip(*trials[1:], strict=True)))
        return MeasuredCopy(kv, self._times)

    def warm_up(self, kv: KvCache) -> KvCache:
        """The cache after every program has run once, which changes nothing in it; donates `kv`."""
        for name in self.programs():
            if name.kind is CopyKind.READ:
                indices = self._indices([1], name.pages)
                read: tuple[PageArrays, ...] = self._compiled[name](kv, indices)
                kv = self._compiled[CopyProgram(CopyKind.WRITE, name.pages)](kv, indices, read)
        return kv

    def copy_out(self, kv: KvCache, pairs: Sequence[tuple[int, int]]) -> list[PageArrays]:
        """Copy device pages, as they are now, to host pages: pairs (device page, host page)."""
        if not pairs:
            return []
        held = self._send_to_host(self._read(kv, [page for page, _ in pairs]))
        for (_, host_page), arrays in zip(pairs, held, strict=True):
            assert 0 < host_page <= self._num_host_pages, f"host page {host_page} of {self._num_host_pages}"
            self._held[host_page] = arrays
        self._num_copied[0] += len(pairs)
        return held

    def _read(self, kv: KvCache, pages: Sequence[int]) -> list[PageArrays]:
        """The contents of device pages, in arrays of their own."""
        read: list[PageArrays] = []
        for batch in self._batches(pages):
            program = CopyProgram(CopyKind.READ, _padded(len(batch)))
            read += self._compiled[program](kv, self._indices(batch, program.pages))[: len(batch)]
        return read

    def _send_to_host(self, read: list[PageArrays]) -> list[PageArrays]:
        held: list[PageArrays] = jax.device_put(read, [self._on_host] * len(read))
        return held

    def start_copy_in(self, pairs: Sequence[tuple[int, int]]) -> list[PageArrays]:
        """Send host pages, as they are now, to the devices: pairs (host page, device page)."""
        if not pairs:
            return []
        wanted = [self._held[host_page] for host_page, _ in pairs]
        sent: list[PageArrays] = jax.device_put(wanted, [self._on_devices] * len(wanted))
        self._arriving += zip((page for _, page in pairs), sent, strict=True)
        self._num_copied[1] += len(pairs)
        return sent

    def finish_copy_in(self, kv: KvCache) -> KvCache:
        """The cache with the pages that were sent since the last call; donates `kv` if there are any."""
        for arrived in self._batches(self._arriving):
            program = CopyProgram(CopyKind.WRITE, _padded(len(arrived)))
            arrays = [page for _, page in arrived]
            arrays += arrays[-1:] * (program.pages - len(arrays))
            indices = self._indices([page for page, _ in arrived], program.pages)
            kv = self._compiled[program](kv, indices, tuple(arrays))
        self._arriving = []
        return kv

    def _batches(self, items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
        """The items in parts that a program takes."""
        assert self._batch or not items, f"{len(items)} copies, but there are no host pages"
        return (items[first : first + self._batch] for first in range(0, len(items), self._batch or 1))

    def _indices(self, pages: Sequence[int], size: int) -> Int32s:
        """Device pages for a program of `size`, padded by repeating the last one."""
        assert all(0 < page < self._num_pages for page in pages), f"device pages {pages} of {self._num_pages}"
        return np.array([*pages, *[pages[-1]] * (size - len(pages))], np.int32)

    def _lower_read(self, pages: int) -> jax.stages.Lowered:
        return _jit_read(self._mesh, self._axis, pages).lower(self._kv, self._page_numbers(pages))

    def _lower_write(self, pages: int) -> jax.stages.Lowered:
        read = jax.eval_shape(_jit_read(self._mesh, self._axis, 1), self._kv, self._page_numbers(1))
        return _jit_write(self._mesh, self._axis, pages).lower(
            self._kv, self._page_numbers(pages), tuple(read) * pages
        )

    def _page_numbers(self, pages: int) -> jax.ShapeDtypeStruct:
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((pages,), np.int32, sharding=everywhere)


def _jit_read(mesh: Mesh, axis: str, pages: int) -> jax.stages.Wrapped:
    """The jitted (cache, page numbers) -> that many PageArrays."""

    def read(kv: KvCache, page_I: Int32[Array, " I"]) -> tuple[PageArrays, ...]:
        def one(index: int) -> PageArrays:
            def at(x: Array) -> Array:
                return jax.lax.dynamic_index_in_dim(x, page_I[index], axis=1, keepdims=False)

            return PageArrays(*jax.tree.map(at, kv))

        return tuple(one(index) for index in range(pages))

    body = jax.shard_map(
        read,
        mesh=mesh,
        in_specs=(kv_specs(axis), PartitionSpec()),
        out_specs=(_page_specs(axis),) * pages,
    )
    return jax.jit(body)


def _jit_write(mesh: Mesh, axis: str, pages: int) -> jax.stages.Wrapped:
    """The jitted (cache, page numbers, that many PageArrays) -> cache, in place."""

    def write(kv: KvCache, page_I: Int32[Array, " I"], arrays: tuple[PageArrays, ...]) -> KvCache:
        for index, page in enumerate(arrays):

            def put(x: Array, new: Array, number: Int32[Array, ""] = page_I[index]) -> Array:
                return jax.lax.dynamic_update_index_in_dim(x, new, number, axis=1)

            kv = jax.tree.map(put, kv, KvCache(*page))
        return kv

    body = jax.shard_map(
        write,
        mesh=mesh,
        in_specs=(kv_specs(axis), PartitionSpec(), (_page_specs(axis),) * pages),
        out_specs=kv_specs(axis),
    )
    return jax.jit(body, donate_argnums=0)


def _page_specs(axis: str) -> PageArrays:
    """Partition of a page: by key/value head, as in the cache."""
    return PageArrays(*(PartitionSpec(spec[0], *spec[2:]) for spec in kv_specs(axis)))  # type: ignore[arg-type]


def _shape_of(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _padded(pages: int) -> int:
    """The least power of two that is not below `pages`, 0 for 0."""
    return 1 << (pages - 1).bit_length() if pages else 0
