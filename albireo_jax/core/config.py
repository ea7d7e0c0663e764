"""Frozen configurations of an engine, checked when they are made."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import PurePath

from albireo_jax.core import checks
from albireo_jax.core.gpu_options import GpuConfig

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

    tp: int = 1
    virtual_devices: int = 0

    def __post_init__(self) -> None:
        """Refuse degrees that no mesh has."""
        _set(
            self,
            tp=_among("tp", self.tp, TP_DEGREES),
            virtual_devices=checks.integer("virtual_devices", self.virtual_devices, low=0),
        )
        if self.virtual_devices and self.virtual_devices < self.tp:
            raise ValueError(f"virtual_devices {self.virtual_devices} is below tp {self.tp}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV pages: tokens per page, how many pages (None: as many as the memory holds), and their precision.

    On a GPU the pages fill what weights leave of `memory_share` of its memory (`runtime.device_memory`).
    `host_memory_bytes` of the host's memory, over all ranks, hold pages that have no room on the devices;
    0 keeps none there. With `prefix_caching`, a prompt that begins like an earlier one reads the full pages
    that hold its beginning, while they last, instead of computing them again.
    """

    page_size: int = 16
    num_pages: int | None = None
    kv_dtype: KvDtype = KvDtype.AUTO
    memory_share: float = MEMORY_SHARE
    host_memory_bytes: int = 0
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        """Refuse caches that hold nothing."""
        _set(
            self,
            page_size=checks.integer("page_size", self.page_size, low=1),
            num_pages=_optional("num_pages", self.num_pages, low=1),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step, and how many steps are in flight.

    `max_rows` requests run at once, `max_step_tokens` tokens are computed per step, and `depth`
    steps are in flight: 1 is the synchronous engine, 2 plans the next step while one runs. A step copies
    `max_copied_pages` pages from the host at most, for which the device needs memory beside the cache. While
    nothing waits, up to `decode_steps` steps are one dispatch: tokens come in bursts of so many.
    """

    max_rows: int = 64
    max_step_tokens: int = STEP_TOKENS
    depth: int = 2
    max_copied_pages: int = 64
    decode_steps: int = 1

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
        )
        if self.max_step_tokens < self.max_rows:
            raise ValueError(f"max_step_tokens {self.max_step_tokens} is below max_rows {self.max_rows}")


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
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_logprobs: int = MAX_LOGPROBS
    sampling: SamplingMode = SamplingMode.SHARDED
    attention: AttentionBackend = AttentionBackend.AUTO
    generation_config: GenerationConfig = GenerationConfig.AUTO
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    step_tokens_by_device: bool = False

    def __post_init__(self) -> None:
        """Refuse lengths that hold no prompt and answer."""
        _set(
            self,
            model=_model_name(self.model),
            dtype=model_dtype(self.dtype),
            quantization=weight_quantization(self.quantization),
            max_model_len=_optional("max_model_len", self.max_model_len, low=2),
            max_logprobs=checks.integer("max_logprobs", self.max_logprobs, low=0, high=MAX_LOGPROBS),
            sampling=checks.choice("sampling", self.sampling, SamplingMode),
            attention=checks.choice("attention", self.attention, AttentionBackend),
        )


def model_dtype(value: object) -> Dtype | None:
    """The dtype that `value` names; None, and "auto", are the one that suits the devices."""
    return None if value is None or value == "auto" else checks.choice("dtype", value, Dtype, also=("auto",))


def weight_quantization(value: object) -> Quantization | None:
    """The quantization that `value` names; None is none."""
    return None if value is None else checks.choice("quantization", value, Quantization)


def _model_name(value: object) -> str:
    name = str(value) if isinstance(value, PurePath) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"model must be a name or a path, got {value!r:.200}")
    return name


def _optional(name: str, value: object, *, low: int) -> int | None:
    return None if value is None else checks.integer(name, value, low=low)


def _among(name: str, value: object, allowed: tuple[int, ...]) -> int:
    number = checks.plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r:.200}")
    return number


def _set(config: object, **values: object) -> None:
    """Give a frozen configuration its checked values, while it is made."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
