"""Frozen configurations of an engine, checked when they are made."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import PurePath
from typing import Annotated, TypedDict

from albireo_jax.core import checks
from albireo_jax.core.gpu_options import GpuConfig, GpuOverrides
from albireo_jax.core.options import Option

TP_DEGREES = (1, 2, 4, 8)
MAX_DEPTH = 8
"""Steps in flight at most; jax 0.10.2 on CPU hangs beyond 32 multi-device steps."""

MEMORY_SHARE = 0.9
"""Share of all of a device's memory for an engine's weights, pages and slots, unless another is given."""

MAX_DECODE_STEPS = 32
"""Tokens per row that one dispatch may sample."""

STEP_TOKENS = 512
"""Tokens per step, unless others are given or suit the device."""

MAX_LOGPROBS = 20
"""Likeliest tokens that a caller can ask for beside each token."""


class Dtype(StrEnum):
    """Of weights and activations, and of cached keys and values unless these have a `KvDtype`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}[self]


class KvDtype(StrEnum):
    """Of cached keys and values: the model's (AUTO), or one of their own.

    INT8 and FP8 (e4m3) keep each vector of a token and head divided by a bfloat16 scale of its own.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FP8 = "fp8"

    def resolve(self, dtype: Dtype) -> "KvDtype":
        """The dtype of the cache for a model of `dtype`: AUTO becomes the model's, the others stay."""
        return KvDtype(dtype.value) if self is KvDtype.AUTO else self

    def vector_bytes(self, head_dim: int, *, dtype: Dtype) -> int:
        """Bytes of the key or the value of one token and head, its scale included."""
        match self.resolve(dtype):
            case KvDtype.FLOAT32:
                return 4 * head_dim
            case KvDtype.BFLOAT16:
                return 2 * head_dim
            case _:
                return head_dim + 2


class Quantization(StrEnum):
    """Codes of one byte that stand for a layer's matrices: multiples of a float32 scale per output channel.

    INT8 keeps -127 … 127 steps of the same size, the others (e4m3) three bits of each number's mantissa. FP8
    (W8A8) also rounds what the matrices are multiplied with, token by token (`nn.fp8`), so that GPUs of sm_89
    and later multiply codes with codes. INT8 and FP8_W8A16 round weights only. Embeddings, output head, norms
    and biases keep the model's dtype.
    """

    INT8 = "int8"
    FP8 = "fp8"
    FP8_W8A16 = "fp8_w8a16"


class AttentionBackend(StrEnum):
    """The implementation of attention: operations of XLA, or CUDA kernels of our own.

    AUTO takes the kernels on NVIDIA GPUs where they can do the model's attention.
    """

    AUTO = "auto"
    XLA = "xla"
    CUDA = "cuda"


class SchedulingPolicy(StrEnum):
    """The order in which requests start, and which of them is preempted; `sched.policy` has the functions.

    FCFS serves requests in the order of their arrival, PRIORITY the lowest `priority` first.
    """

    FCFS = "fcfs"
    PRIORITY = "priority"

    @property
    def takes_priority(self) -> bool:
        """Whether the order depends on the `priority` of requests; others refuse all but 0."""
        return self is SchedulingPolicy.PRIORITY


class SamplingMode(StrEnum):
    """The ranks that sample a step's rows: each a share of them, or every rank all of them."""

    SHARDED = "sharded"
    REPLICATED = "replicated"


class GenerationConfig(StrEnum):
    """The source of sampling parameters that a caller leaves out.

    AUTO takes those of the model's generation_config.json where it has one, NONE our own.
    """

    AUTO = "auto"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Devices: the tensor-parallel degree, and virtual CPU devices to run it on (0: real ones)."""

    tp: Annotated[int, Option(help=f"Devices that share the model: one of {list(TP_DEGREES)}.")] = 1
    virtual_devices: Annotated[int, Option(help="Let the CPU stand for N devices; 0: use real ones.")] = 0

    def __post_init__(self) -> None:
        """Refuse degrees that no mesh has."""
        _set(
            self,
            tp=_among("tp", self.tp, TP_DEGREES),
            virtual_devices=checks.integer("virtual_devices", self.virtual_devices, low=0),
        )
        if self.virtual_devices and self.virtual_devices < self.tp:
            raise ValueError(f"virtual_devices {self.virtual_devices} is below tp {self.tp}")


class ParallelOverrides(TypedDict, total=False):
    """Keyword arguments that set a `ParallelConfig`."""

    tp: int
    virtual_devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV pages: tokens per page, how many pages (None: as many as the memory holds), and their precision.

    On a GPU the pages fill what weights leave of `memory_share` of its memory (`runtime.device_memory`).
    `host_memory_bytes` of the host's memory, over all ranks, hold pages that have no room on the devices;
    0 keeps none there. With `prefix_caching`, a prompt that begins like an earlier one reads the full pages
    that hold its beginning, while they last, instead of computing them again.
    """

    num_pages: Annotated[
        int | None,
        Option(help="Pages of the key/value cache. Default: what requests can use and memory holds."),
    ] = None
    page_size: Annotated[int, Option(help="Tokens per page.")] = 16
    kv_dtype: Annotated[
        KvDtype,
        Option(
            name="kv_cache_dtype",
            help="Of cached keys and values; int8 and fp8 are scaled per token and head. auto: as the model.",
        ),
    ] = KvDtype.AUTO
    memory_share: Annotated[
        float,
        Option(
            help="Share of each GPU's memory for weights and pages; activations and CUDA need what is left."
        ),
    ] = MEMORY_SHARE
    host_memory_bytes: Annotated[
        int,
        Option(
            name="host_kv_memory_bytes",
            gib_flag="host_kv_memory",
            help="Memory of the host for cached keys and values that have no room on the devices; 0: none.",
        ),
    ] = 0
    prefix_caching: Annotated[
        bool, Option(help="Read the beginning of a prompt from the cache if an earlier one began like it.")
    ] = True

    def __post_init__(self) -> None:
        """Refuse caches that hold nothing."""
        _set(
            self,
            page_size=checks.integer("page_size", self.page_size, low=1),
            num_pages=checks.optional_integer("num_pages", self.num_pages, low=1),
            kv_dtype=checks.choice("kv_cache_dtype", self.kv_dtype, KvDtype),
            memory_share=checks.number("memory_share", self.memory_share, low=-math.inf, high=math.inf),
            host_memory_bytes=checks.integer(
                "host_memory_bytes", self.host_memory_bytes, low=None, high=None
            ),
            prefix_caching=checks.flag("prefix_caching", self.prefix_caching),
        )
        if self.page_size not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise ValueError(f"page_size must be a power of two from 1 to 128, got {self.page_size}")
        if self.host_memory_bytes < 0:
            raise ValueError(f"host_memory_bytes must not be negative, got {self.host_memory_bytes}")
        if not 0 < self.memory_share < 1:
            raise ValueError(f"memory_share must be above 0 and below 1, got {self.memory_share}")


class CacheOverrides(TypedDict, total=False):
    """Keyword arguments that set a `CacheConfig`."""

    num_pages: int | None
    page_size: int
    kv_cache_dtype: str
    memory_share: float
    host_kv_memory_bytes: int
    prefix_caching: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step, and how many steps are in flight.

    `max_rows` requests run at once, `max_step_tokens` tokens are computed per step, and `depth`
    steps are in flight: 1 is the synchronous engine, 2 plans the next step while one runs. A step copies
    `max_copied_pages` pages from the host at most, for which the device needs memory beside the cache. While
    nothing waits, up to `decode_steps` steps are one dispatch: tokens come in bursts of so many.
    `scheduling_policy` names the order in which requests start, and in which they are preempted from its end.
    """

    max_rows: Annotated[int, Option(help="Requests computed at once; the others wait.")] = 64
    max_step_tokens: Annotated[
        int,
        Option(
            is_open=True,
            help="Tokens computed per step; longer prompts take several. Default: 512; 2048 on 80 GB GPUs.",
        ),
    ] = STEP_TOKENS
    depth: Annotated[
        int, Option(help=f"Steps in flight, up to {MAX_DEPTH}; 1 plans and computes in turn.")
    ] = 2
    decode_steps: Annotated[
        int,
        Option(
            metavar="K",
            help="Tokens per request that one dispatch samples while nothing waits; they come in bursts.",
        ),
    ] = 1
    scheduling_policy: Annotated[
        SchedulingPolicy,
        Option(
            help="Order of requests: that of their arrival, or the lowest `priority` of their bodies first."
        ),
    ] = SchedulingPolicy.FCFS
    max_copied_pages: int = 64

    def __post_init__(self) -> None:
        """Refuse limits that would let nothing run."""
        integer = partial(checks.integer, low=1)
        _set(
            self,
            max_rows=integer("max_rows", self.max_rows),
            max_step_tokens=integer("max_step_tokens", self.max_step_tokens),
            max_copied_pages=integer("max_copied_pages", self.max_copied_pages),
            depth=integer("depth", self.depth, high=MAX_DEPTH),
            decode_steps=integer("decode_steps", self.decode_steps, high=MAX_DECODE_STEPS),
            scheduling_policy=checks.choice("scheduling_policy", self.scheduling_policy, SchedulingPolicy),
        )
        if self.max_step_tokens < self.max_rows:
            raise ValueError(f"max_step_tokens {self.max_step_tokens} is below max_rows {self.max_rows}")


class SchedulerOverrides(TypedDict, total=False):
    """Keyword arguments that set a `SchedulerConfig`; max_step_tokens None leaves them to the device."""

    max_rows: int
    max_step_tokens: int | None
    depth: int
    decode_steps: int
    scheduling_policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that `launch` needs to turn a model into a running engine.

    `model` is a built-in name, a Hugging Face folder or a GGUF file. `max_model_len` None takes
    the model's own limit, or less if the cache cannot hold it. `max_logprobs` of the likeliest tokens can be
    asked for beside each token; 0 turns log probabilities off, and their programs are not compiled.
    `step_tokens_by_device` raises `scheduler.max_step_tokens` on large devices (`core.sizes`).
    `quantization` stores the layers' matrices in one byte a number, made while the model is loaded.
    """

    model: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Annotated[
        Dtype | None,
        Option(
            none_word="auto",
            help="Of weights and activations. Default, and auto: bfloat16 on GPUs, float32 on CPUs.",
        ),
    ] = None
    quantization: Annotated[
        Quantization | None,
        Option(
            help="Keep the layers' matrices in one byte a number, made while loading; fp8 also rounds what "
            "they are multiplied with (W8A8), the others only weights. Default: as --dtype."
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Option(help="Longest sequence, prompt and answer. Default: the model's own, or what memory holds."),
    ] = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_logprobs: Annotated[
        int, Option(help="Likeliest tokens that can be asked for beside each token; 0: no log probabilities.")
    ] = MAX_LOGPROBS
    sampling: Annotated[
        SamplingMode, Option(help="Split the sampling of a step over the devices, or do all of it on each.")
    ] = SamplingMode.SHARDED
    attention: Annotated[
        AttentionBackend,
        Option(
            help="Operations of XLA, or CUDA kernels. auto: kernels on NVIDIA GPUs for models they can do."
        ),
    ] = AttentionBackend.AUTO
    generation_config: Annotated[
        GenerationConfig,
        Option(
            help="Sampling parameters that a request leaves out: the model's generation_config.json, or not."
        ),
    ] = GenerationConfig.AUTO
    gpu: GpuConfig = field(default_factory=GpuConfig)
    step_tokens_by_device: bool = False

    def __post_init__(self) -> None:
        """Refuse lengths that hold no prompt and answer."""
        _set(
            self,
            model=_model_name(self.model),
            dtype=checks.optional_choice("dtype", self.dtype, Dtype, none_word="auto"),
            quantization=checks.optional_choice("quantization", self.quantization, Quantization),
            max_model_len=checks.optional_integer("max_model_len", self.max_model_len, low=2),
            max_logprobs=checks.integer("max_logprobs", self.max_logprobs, low=0, high=MAX_LOGPROBS),
            sampling=checks.choice("sampling", self.sampling, SamplingMode),
            attention=checks.choice("attention", self.attention, AttentionBackend),
            generation_config=checks.choice("generation_config", self.generation_config, GenerationConfig),
        )


class EngineOverrides(ParallelOverrides, CacheOverrides, SchedulerOverrides, GpuOverrides, total=False):
    """Keyword arguments that set an `EngineConfig` and the configurations that it holds.

    Texts stand for members of the enumerations. The fields themselves say what the options mean.
    """

    dtype: str | None
    quantization: str | None
    max_model_len: int | None
    max_logprobs: int
    sampling: str
    attention: str
    generation_config: str


def _model_name(value: object) -> str:
    name = str(value) if isinstance(value, PurePath) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"model must be a name or a path, got {value!r:.200}")
    return name


def _among(name: str, value: object, allowed: tuple[int, ...]) -> int:
    number = checks.plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r:.200}")
    return number


def _set(config: object, **values: object) -> None:
    """Give a frozen configuration its checked values, while it is made."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
