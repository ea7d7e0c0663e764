"""Qwen3, dense."""

import dataclasses
from typing import ClassVar

from albireo_jax.models.llama import GGUF_NAMES, Llama
from albireo_jax.nn.weights import TensorNames


class Qwen3(Llama):
    """Llama with queries and keys normalized head by head before they are rotated."""

    gguf_names: ClassVar[TensorNames] = dataclasses.replace(GGUF_NAMES, interleaved_rope=False)
