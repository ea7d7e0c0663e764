"""GGUF files: the configuration in their metadata, and their tensors dequantised part by part."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from albireo_jax.core.architectures import BY_GGUF_NAME
from albireo_jax.core.errors import ModelError, UnknownArchitectureError, WeightError
from albireo_jax.core.gguf_metadata import GgufTensor, read_gguf_header, split_parts
from albireo_jax.core.hf_rope import yarn_attention_factor
from albireo_jax.core.model_config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from albireo_jax.nn.layers import rope_frequencies
from albireo_jax.nn.tensors import StoredTensor

_EXPECTED = {
    "expert_count": 0,
    "logit_scale": 1,
    "embedding_scale": 1,
    "residual_scale": 1,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.causal": 1,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "use_parallel_residual": 0,
}
"""Keys that ask for something that these models do not do, unless they have this value."""

_NOT_FLOATS = ("I8", "I16", "I32", "I64")
_QUERY_BIAS = "blk.0.attn_q.bias"  # llama and qwen3 may have biases of queries, keys and values
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_TOLERANCE = 1e-3


class GgufSource:
    """The tensors of a GGUF file or its parts; see `TensorSource`. Quantised ones come out as float32."""

    def __init__(self, file: Path) -> None:
        """Map the file, and the other parts if it is one of several, and read their headers.

        Raises ModelError if it is not a GGUF file or a part is missing, WeightError naming a tensor that is
        cut off or is there twice.
        """
        self._rows: dict[str, NDArray[np.uint8]] = {}
        self._types: dict[str, GGMLQuantizationType] = {}
        self._tensors: dict[str, StoredTensor] = {}
        parts = split_parts(file)
        headers = [read_gguf_header(part) for part in parts]
        self.file = parts[0]
        self._metadata = headers[0].metadata
        for part, header in zip(parts, headers, strict=True):
            content = np.memmap(part, np.uint8, "r")
            for tensor in header.tensors:
                self._add(part, content, tensor)
        expected = self._metadata.get("split.tensors.count", len(self._tensors))
        if len(parts) > 1 and expected != len(self._tensors):
            raise WeightError(
                f"{self.file}: its {len(parts)} parts have {len(self._tensors)} tensors, expected {expected}"
            )

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        return self._tensors

    def read(self, name: str, *index: slice) -> NDArray[Any]:
        """The part of a tensor that `index` selects; only the blocks that it touches are dequantised."""
        raw, width = self._rows[name], self._tensors[name].shape[-1]
        rows, rest = index[: raw.ndim - 1], index[raw.ndim - 1 :]
        columns = rest[0] if rest else slice(0, width)
        block, block_bytes = GGML_QUANT_SIZES[self._types[name]]
        first, last = columns.start // block, -(-columns.stop // block)
        part = raw[(*rows, slice(first * block_bytes, last * block_bytes))]
        values = dequantize(np.ascontiguousarray(part), self._types[name])
        return values[..., columns.start - first * block : columns.stop - first * block]

    def value(self, key: str) -> object:
        """Metadata under `key`, None if there is none."""
        return self._metadata.get(key)

    def _add(self, file: Path, content: NDArray[np.uint8], tensor: GgufTensor) -> None:
        """Note a tensor as rows of bytes, one per row of its last axis."""
        if tensor.name in self._tensors:
            other = self._tensors[tensor.name].file
            raise WeightError(f"{file}: tensor {tensor.name} is there twice, also in {other}")
        try:
            kind = GGMLQuantizationType(tensor.type)
        except ValueError as error:
            raise WeightError(f"{file}: tensor {tensor.name} is of unknown type {tensor.type}") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        *rows, width = tensor.shape or (1,)
        if width % block:
            raise WeightError(
                f"{file}: tensor {tensor.name} has rows of {width}, not of whole {kind.name} blocks"
            )
        shape = (*rows, width // block * block_bytes)
        end = tensor.offset + math.prod(shape)
        if end > content.size:
            raise WeightError(
                f"{file} is truncated: tensor {tensor.name} ends at byte {end} of {content.size}"
            )
        self._rows[tensor.name] = content[tensor.offset : end].reshape(shape)
        self._types[tensor.name] = kind
        self._tensors[tensor.name] = StoredTensor(
            file=file,
            shape=tensor.shape,
            dtype=kind.name,
            is_float=kind.name not in _NOT_FLOATS,
        )


def model_config_from_gguf(source: GgufSource) -> ModelConfig:
    """`ModelConfig` of a GGUF file's metadata and tensor shapes.

    Raises UnknownArchitectureError with the known ones, ModelError naming a key that is missing,
    of a wrong type or of a value that is not supported.
    """
    meta = _Metadata(source)
    embed = source.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise WeightError(f"{source.file}: missing tensor token_embd.weight")
    num_heads = meta.integer("attention.head_count")
    hidden_size = meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden_size // max(num_heads, 1))
    meta.refuse_unless("attention.value_length", head_dim)
    meta.refuse_unless("rope.dimension_count", head_dim)
    for name, expected in _EXPECTED.items():
        meta.refuse_unless(name, expected)
    theta = meta.number("rope.freq_base", 10000.0)
    try:
        return ModelConfig(
            architecture=BY_GGUF_NAME[meta.architecture],
            num_layers=meta.integer("block_count"),
            hidden_size=hidden_size,
            intermediate_size=meta.integer("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=meta.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=embed.shape[0],
            max_position=meta.integer("context_length"),
            rms_norm_eps=meta.number("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_rope_scaling(source, meta, head_dim=head_dim, theta=theta),
            sliding_window=meta.integer("attention.sliding_window", 0) or None,
            tie_word_embeddings="output.weight" not in source.tensors,
            attention_bias=meta.architecture == "qwen2" or _QUERY_BIAS in source.tensors,
            qk_norm=meta.architecture == "qwen3",
            bos_token_id=meta.token_id("bos_token_id"),
            eos_token_ids=_eos_token_ids(meta),
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{source.file} describes no model: {error}") from error


class _Metadata:
    """Typed reads of a GGUF file's keys, those of its architecture without their prefix."""

    def __init__(self, source: GgufSource) -> None:
        self._source = source
        self.architecture = str(source.value("general.architecture"))
        if self.architecture not in BY_GGUF_NAME:
            raise UnknownArchitectureError(
                f"{source.file}: architecture {self.architecture!r} is not one of those known in GGUF files: "
                f"{sorted(BY_GGUF_NAME)}"
            )

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._error(name, f"must be an integer, got {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._error(name, f"must be a positive number, got {value!r}")
        return float(value)

    def text(self, name: str, default: str) -> str:
        return str(self._value(name, default))

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}"
        value = self._source.value(key)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ModelError(f"{self._source.file}: {key} must be a token id, got {value!r}")
        return value

    def refuse_unless(self, name: str, expected: int | float) -> None:
        value = self._value(name, expected)
        if isinstance(value, str | list) or value != expected:
            raise self._error(name, f"{value!r:.200} is not supported, only {expected:g} is")

    def _value(self, name: str, default: object) -> Any:
        value = self._source.value(f"{self.architecture}.{name}")
        if value is None:
            value = default
        if value is None:
            raise self._error(name, "is missing")
        return value

    def _error(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self._source.file}: {self.architecture}.{name} {what}")


def _eos_token_ids(meta: _Metadata) -> tuple[int, ...]:
    """End of text, of a turn, and of a message: each id once."""
    ids = (meta.token_id(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _rope_scaling(source: GgufSource, meta: _Metadata, *, head_dim: int, theta: float) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, one of the older `rope.scale_linear` too."""
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    kind = meta.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    meta.refuse_unless("rope.scaling.attn_factor", 1.0)
    if _ROPE_FACTORS in source.tensors and kind == "none":
        return _llama3_scaling(source, head_dim=head_dim, theta=theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or _ROPE_FACTORS in source.tensors:
        beside = f" beside {_ROPE_FACTORS}" if _ROPE_FACTORS in source.tensors else ""
        raise ModelError(
            f"{source.file}: {meta.architecture}.rope.scaling.type {kind!r}{beside} is not supported; "
            f"those are 'none', 'linear', 'yarn' and Llama 3.1's {_ROPE_FACTORS}"
        )
    if factor == 1.0:
        factor = meta.number("rope.scaling.factor")  # a kind without a factor is refused
    if kind == "linear":
        return LinearRopeScaling(factor=factor)
    meta.refuse_unless("rope.scaling.yarn_log_multiplier", 0.0)
    meta.refuse_unless("rope.scaling.yarn_ext_factor", 1.0)
    attention = meta.number("rope.scaling.yarn_attn_factor", 1.0)
    return YarnRopeScaling(
        factor=factor,
        original_max_position=meta.integer(
            "rope.scaling.original_context_length", meta.integer("context_length")
        ),
        attention_factor=attention * yarn_attention_factor(factor),
        beta_fast=meta.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _llama3_scaling(source: GgufSource, *, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3.1's parameters from the divisors of its frequencies, all that a GGUF file keeps of them.

    All published models blend between 1 and 4 turns over the original context, whose length then
    follows from any frequency in between. ModelError if that does not give the divisors back.
    """
    factors = source.read(_ROPE_FACTORS).astype(np.float64)
    factor = float(factors.max())
    if factors.shape == (head_dim // 2,) and factor == factors.min() == 1.0:
        return None
    low, high = 1.0, 4.0
    plain = rope_frequencies(head_dim, theta, None)
    if factors.shape == plain.shape and factor > 1.0:
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
        blended = (kept > _ROPE_TOLERANCE) & (kept < 1 - _ROPE_TOLERANCE)
        turns = low + kept[blended] * (high - low)
        originals = 2 * math.pi * turns / plain[blended]
        scaling = Llama3RopeScaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=round(float(np.median(originals))) if len(originals) else 8192,
        )
        if np.allclose(plain / rope_frequencies(head_dim, theta, scaling), factors, rtol=_ROPE_TOLERANCE):
            return scaling
    raise ModelError(
        f"{source.file}: {_ROPE_FACTORS} is not a Llama 3.1 rope scaling, which is all that is supported"
    )
