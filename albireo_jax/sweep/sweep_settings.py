"""The settings of a sweep: variants of the engine, degrees, load and sizes."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from albireo_jax.core.config import TP_DEGREES, CacheConfig, Dtype, SamplingMode
from albireo_jax.core.types import SamplingParams
from albireo_jax.measure.loads import OfferedLoad


class Variant(StrEnum):
    """The ablation: each has what the one before it has, and one thing more."""

    SYNCHRONOUS = "synchronous"
    OVERLAPPED = "overlapped"
    SHARDED = "overlapped + sharded sampling"

    @property
    def depth(self) -> int:
        """Steps in flight."""
        return 1 if self is Variant.SYNCHRONOUS else 2

    @property
    def sampling(self) -> SamplingMode:
        """The ranks that sample rows."""
        return SamplingMode.SHARDED if self is Variant.SHARDED else SamplingMode.REPLICATED

    @property
    def short(self) -> str:
        """The variant where there is little room."""
        return {"SYNCHRONOUS": "sync", "OVERLAPPED": "overlap", "SHARDED": "shard"}[self.name]

    @property
    def slug(self) -> str:
        """The variant in a file name."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """A sweep of a cluster of `gpus` over the `degrees`, all at the same `load`.

    A replica of t GPUs computes `rows_per_gpu` x t requests at once. With `virtual_devices` above 0 the CPU
    stands for the GPUs. `one_replica` measures one replica of each degree with its share of the load, and
    multiplies; otherwise all run side by side. `interleaved` measures the variants in turn, in one process,
    repeat by repeat; otherwise each has a process, and a GPU's memory, to itself. `gpu_memory_bytes` is what
    an engine may think a GPU has; None takes what there is.
    """

    model: str
    gpus: int
    degrees: tuple[int, ...]
    load: OfferedLoad
    one_replica: bool
    interleaved: bool
    variants: tuple[Variant, ...] = tuple(Variant)
    virtual_devices: int = 0
    dtype: Dtype | None = None
    gpu_memory_bytes: int | None = None
    rows_per_gpu: int = 32
    max_step_tokens: int = 512
    page_size: int = 16
    repeats: int = 3
    warmups: int = 1
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no cluster can be asked for, saying what could be."""
        for name, value in (
            ("gpus", self.gpus),
            ("rows_per_gpu", self.rows_per_gpu),
            ("repeats", self.repeats),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        SamplingParams(temperature=self.temperature, top_p=self.top_p)  # checks their ranges
        CacheConfig(page_size=self.page_size)
        if self.warmups < 0:
            raise ValueError(f"warmups must not be negative, got {self.warmups}")
        if not self.degrees:
            raise ValueError(f"tp names no degree; possible with {self.gpus} GPUs: {self._possible()}")
        if len(set(self.degrees)) < len(self.degrees):
            raise ValueError(f"tp names a degree twice: {listed(self.degrees)}")
        for tp in self.degrees:
            self._check_degree(tp)
        if self.gpu_memory_bytes is not None and self.gpu_memory_bytes < 1:
            raise ValueError(f"gpu_memory must be above 0, got {self.gpu_memory_bytes} bytes")
        if self.virtual_devices:
            self._check_virtual_devices()
        elif self.interleaved and self.gpu_memory_bytes is None:
            raise ValueError(
                "interleaved variants share each GPU's memory: say with --gpu-memory how much to share"
            )

    @property
    def how(self) -> str:
        """The way in which the figures of the cluster come about, in short; see `Case.how`."""
        replicas = "one replica measured, times N/t" if self.one_replica else "all replicas measured, summed"
        return f"{replicas}; virtual devices share the cores" if self.virtual_devices else replicas

    def described(self) -> dict[str, str]:
        """The settings that a reader needs to repeat the sweep, besides model, GPUs and load."""
        turns = "in turn in one process" if self.interleaved else "one after the other, a process each"
        memory = self.gpu_memory_bytes
        return {
            "degrees": listed(self.degrees),
            "variants": f"{turns}, a different one first in each repeat" if self.interleaved else turns,
            "repeats": f"{self.repeats} after {self.warmups} warm-up runs",
            "rows": f"{self.rows_per_gpu} per GPU",
            "step": f"{self.max_step_tokens} tokens at most, or as many as rows",
            "page": f"{self.page_size} tokens",
            "memory": "as found" if memory is None else f"{memory / 2**30:.4g} GiB per GPU",
            "sampling": f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}",
        }

    def _check_degree(self, tp: int) -> None:
        if tp > self.gpus:
            problem = f"tp {tp} needs {tp} GPUs, the cluster has {self.gpus}"
        elif tp not in TP_DEGREES:
            problem = f"tp must be one of {list(TP_DEGREES)}, got {tp}"
        elif self.gpus % tp:
            problem = f"{self.gpus} GPUs cannot be divided into replicas of {tp}"
        else:
            return
        raise ValueError(f"{problem}; possible with {self.gpus} GPUs: {self._possible()}")

    def _check_virtual_devices(self) -> None:
        if self.virtual_devices > self.gpus:
            raise ValueError(
                f"{self.virtual_devices} virtual devices are more than the {self.gpus} GPUs they stand for"
            )
        needed = max(self.degrees) if self.one_replica else self.gpus
        if self.virtual_devices < needed:
            what = f"tp {needed}" if self.one_replica else f"all replicas of {self.gpus} GPUs together"
            raise ValueError(f"{what} needs {needed} virtual devices, got {self.virtual_devices}")

    def _possible(self) -> str:
        return listed(t for t in TP_DEGREES if self.gpus % t == 0)


def engine_samplings(variants: tuple[Variant, ...], *, tp: int) -> tuple[SamplingMode, ...]:
    """The engines that serve these variants: depths share one, and at tp 1 there is one way to sample."""
    return tuple(dict.fromkeys(engine_sampling(variant, tp=tp) for variant in variants))


def engine_sampling(variant: Variant, *, tp: int) -> SamplingMode:
    """The sampling of the engine that serves a variant."""
    return variant.sampling if tp > 1 else SamplingMode.SHARDED


def listed(degrees: Iterable[int]) -> str:
    """Degrees as --tp takes them."""
    return ",".join(map(str, degrees))
