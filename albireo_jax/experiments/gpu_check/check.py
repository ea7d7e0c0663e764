"""What every part of the check is told, and the engines that the parts share: real shapes, and tiny ones.

All engines of a model have one configuration, so that a program that one part compiled is found by the next
in the persistent cache.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from albireo_jax.core.config import CacheConfig, EngineConfig, ModelConfig, Quantization, SchedulerConfig
from albireo_jax.experiments.gpu_check.notebook import Notebook, PartSkipped
from albireo_jax.experiments.gpu_programs import MODELS
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.runtime.batch import Bucket

_QWEN3 = partial(
    ModelConfig,
    architecture="Qwen3ForCausalLM",
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    qk_norm=True,
)

_TINY = partial(
    ModelConfig,
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    vocab_size=512,
    max_position=2048,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
)

_TINY_QWEN3 = partial(  # with heads as wide as other engines want them
    _TINY, architecture="Qwen3ForCausalLM", head_dim=64, qk_norm=True
)

LEAST_ROWS = 2
"""Rows of the smallest decode step: products of one row are slow, and the engine pads it too."""

LARGE, SMALL_QWEN, LARGE_QWEN = "llama-3.1-8b", "qwen3-0.6b", "qwen3-8b"

SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        **MODELS,
        SMALL_QWEN: _QWEN3(
            num_layers=28,
            hidden_size=1024,
            intermediate_size=3072,
            num_heads=16,
            tie_word_embeddings=True,
        ),
        LARGE_QWEN: _QWEN3(num_layers=36, hidden_size=4096, intermediate_size=12288, num_heads=32),
    }
)
"""Shapes of the models whose steps are measured."""

_TINY_SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.1-8b": _TINY(architecture="LlamaForCausalLM"),
        "llama-3.1-70b": _TINY(architecture="LlamaForCausalLM"),
        "qwen2.5-32b": _TINY(architecture="Qwen2ForCausalLM", attention_bias=True),
        SMALL_QWEN: _TINY_QWEN3(tie_word_embeddings=True),
        LARGE_QWEN: _TINY_QWEN3(),
    }
)
"""What stands for each of them in a small check, which only shows that everything runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a part is told: how large everything is, where real data lies, and where figures go.

    `data` is None where there is none. `peers` are the engines that ours is compared with, and what runs
    each. The files are what only some parts write, None if nobody wants them; the planner's tables go to
    `output`.
    """

    small: bool
    on_cpu: bool
    data: Path | None
    output: Path
    notebook: Notebook
    peers: Mapping[str, str] = field(default_factory=dict[str, str])
    dump_target: Path | None = None
    dump_hlo: Path | None = None

    def data_folder(self) -> Path:
        """The folder of real data; raises PartSkipped where there is none."""
        if self.data is None or not self.data.is_dir():
            raise PartSkipped(f"it needs --data FOLDER with the real data; got {self.data}")
        return self.data

    def shape(self, name: str) -> ModelConfig:
        """The model of this name, or what stands for it in a small check."""
        return (_TINY_SHAPES if self.small else SHAPES)[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Limits of the engine that all parts share."""

    max_rows: int
    max_step_tokens: int
    max_model_len: int

    @classmethod
    def of(cls, *, small: bool) -> "Sizes":
        """Those of a real check or of a small one."""
        if small:
            return cls(max_rows=8, max_step_tokens=64, max_model_len=512)
        return cls(max_rows=256, max_step_tokens=2048, max_model_len=16384 + 256)

    def config(
        self,
        *,
        host_memory_bytes: int = 0,
        num_pages: int | None = None,
        quantization: Quantization | None = None,
    ) -> EngineConfig:
        """The engine's configuration, defaults but for these sizes; it gives no log probabilities."""
        return EngineConfig(
            model="random",
            quantization=quantization,
            max_model_len=self.max_model_len,
            max_logprobs=0,
            cache=CacheConfig(num_pages=num_pages, host_memory_bytes=host_memory_bytes),
            scheduler=SchedulerConfig(max_rows=self.max_rows, max_step_tokens=self.max_step_tokens),
        )


def prepared(
    check: Check, model: str, buckets: tuple[Bucket, ...], *, quantization: Quantization | None = None
) -> Prepared:
    """The shared engine with random weights of this shape, for steps of these sizes only.

    It fills the device's memory: no other engine may be held when it is made.
    """
    free()
    return prepare_random(
        Sizes.of(small=check.small).config(quantization=quantization), check.shape(model), buckets=buckets
    )


def free() -> None:
    """Give back the memory of engines that nothing holds but cycles."""
    gc.collect()
