"""Qwen2 and Qwen2.5."""

import dataclasses
from typing import ClassVar

from albireo_jax.models.llama import GGUF_NAMES, Llama
from albireo_jax.nn.weights import TensorNames


class Qwen2(Llama):
    """Llama with biases on queries, keys and values."""

    gguf_names: ClassVar[TensorNames] = dataclasses.replace(GGUF_NAMES, interleaved_rope=False)
