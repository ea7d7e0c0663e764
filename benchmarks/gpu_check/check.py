"""The settings that every part of the check is given, and sizes that they share: real shapes, and tiny ones.

All engines of a model have one configuration, so that a program that one part compiled is found by the next
in the persistent cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax

from albireo_jax.core.config import (
    MEMORY_SHARE,
    CacheConfig,
    EngineConfig,
    Quantization,
    SchedulerConfig,
)
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.launch import cache_folder
from albireo_jax.runtime.compile import use_persistent_cache
from albireo_jax.runtime.device_memory import take_memory
from benchmarks.gpu_check.part_figures import PartFigures, PartSkipped
from benchmarks.gpu_check.part_settings import PartSettings
from benchmarks.gpu_programs.compiled_programs import MODELS

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
"""Tiny shapes in place of these in a small check, which only shows that everything runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The settings of a part: the run's options, and where figures go."""

    settings: PartSettings
    figures: PartFigures

    @property
    def small(self) -> bool:
        """Whether everything is tiny, and only shown to run."""
        return self.settings.small

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.settings.on_cpu

    @property
    def output(self) -> Path:
        """The folder of results."""
        return Path(self.settings.output)

    @property
    def carried(self) -> Path:
        """The folder of what the next run may use."""
        return Path(self.settings.carried)

    @property
    def peers(self) -> Mapping[str, str]:
        """Engines that ours is compared with, and what runs each."""
        return self.settings.peers

    def data_folder(self) -> Path:
        """The folder of real data; raises PartSkipped where there is none."""
        folder = self.settings.data
        if folder is None or not Path(folder).is_dir():
            raise PartSkipped(f"it needs --data FOLDER with the real data; got {folder}")
        return Path(folder)

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
        """The sizes of a real check, or of a small one, whose parts share their few programs."""
        if small:
            return cls(max_rows=4, max_step_tokens=64, max_model_len=512)
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


def new_check(settings: PartSettings, figures: PartFigures) -> Check:
    """The check that a part is told. JAX is held to the device that was asked for; it starts later.

    Then it takes of a GPU what it takes in the product, and keeps programs where that does, whatever the part
    calls first.
    """
    jax.config.update("jax_platforms", "cpu" if settings.on_cpu else "cuda,cpu")
    take_memory(MEMORY_SHARE)
    use_persistent_cache(cache_folder())
    return Check(settings=settings, figures=figures)
