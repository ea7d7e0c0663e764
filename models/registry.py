"""From a model's files to its configuration and its sharded module; architectures are imported on demand."""

from jax.sharding import Mesh

from albireo_jax.core.config import Dtype, ModelConfig
from albireo_jax.core.errors import UnknownArchitectureError
from albireo_jax.core.hf_config import ARCHITECTURES, read_hf_config
from albireo_jax.core.model_files import ModelFiles, ModelFormat
from albireo_jax.models.llama import Llama
from albireo_jax.nn.gguf import GgufSource, model_config_from_gguf
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.tensors import SafetensorsSource
from albireo_jax.nn.weights import load_weights


def model_config(files: ModelFiles) -> ModelConfig:
    """Shape of the model in `files`; nothing but headers is read.

    Raises ModelError, or its UnknownArchitectureError, naming what is broken or not supported.
    """
    match files.format:
        case ModelFormat.HF_FOLDER:
            return read_hf_config(files.path)
        case ModelFormat.GGUF:
            return model_config_from_gguf(GgufSource(files.path))


def load_model(files: ModelFiles, *, config: ModelConfig, dtype: Dtype, mesh: Mesh) -> Decoder:
    """The model in `files`, converted to `dtype`, each device of `mesh` reading only its share.

    Raises WeightError naming the file and tensor that is missing, unused or broken.
    """
    model = model_class(config.architecture)
    match files.format:
        case ModelFormat.HF_FOLDER:
            source, names = SafetensorsSource(files.path), model.hf_names
        case ModelFormat.GGUF:
            source, names = GgufSource(files.path), model.gguf_names
    return model(config, load_weights(source, names, config=config, dtype=dtype, mesh=mesh), mesh)


def model_class(architecture: str) -> type[Llama]:
    """Module of an architecture, by its Hugging Face name."""
    match architecture:
        case "LlamaForCausalLM":
            return Llama
        case "MistralForCausalLM":
            from albireo_jax.models.mistral import Mistral

            return Mistral
        case "Qwen2ForCausalLM":
            from albireo_jax.models.qwen2 import Qwen2

            return Qwen2
        case "Qwen3ForCausalLM":
            from albireo_jax.models.qwen3 import Qwen3

            return Qwen3
        case _:
            raise UnknownArchitectureError(
                f"architecture {architecture!r} is not one of those known: {sorted(ARCHITECTURES)}"
            )
