"""The architectures that this project runs, by all the names that files of models give them."""

from types import MappingProxyType
from typing import NamedTuple


class ArchitectureNames(NamedTuple):
    """The `model_type` of an architecture in a config.json, and its `general.architecture` in GGUF files."""

    model_type: str
    gguf: str | None


ARCHITECTURES = MappingProxyType(
    {
        "LlamaForCausalLM": ArchitectureNames("llama", "llama"),
        "MistralForCausalLM": ArchitectureNames("mistral", None),  # llama in GGUF files
        "Qwen2ForCausalLM": ArchitectureNames("qwen2", "qwen2"),
        "Qwen3ForCausalLM": ArchitectureNames("qwen3", "qwen3"),
    }
)
"""Names of an architecture by that of its class in transformers, which is its name here."""

BY_MODEL_TYPE = MappingProxyType({names.model_type: name for name, names in ARCHITECTURES.items()})

BY_GGUF_NAME = MappingProxyType(
    {names.gguf: name for name, names in ARCHITECTURES.items() if names.gguf is not None}
)
