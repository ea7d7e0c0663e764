"""From a model's files to its configuration and its sharded module; architectures are imported on demand."""

from importlib import import_module

from jax.sharding import Mesh

from albireo_jax.core.architectures import ARCHITECTURES
from albireo_jax.core.config import Dtype
from albireo_jax.core.errors import UnknownArchitectureError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.hf_config import read_hf_config
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import ModelFiles, ModelFormat
from albireo_jax.models.llama import Llama
from albireo_jax.nn.gguf import GgufSource, model_config_from_gguf
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.random_weights import random_weights
from albireo_jax.nn.tensors import SafetensorsSource
from albireo_jax.nn.weights import load_weights


def model_config(files: ModelFiles) -> ModelConfig:
    """Shape of the model in `files`; nothing but headers is read.

    Raises ModelError, or its UnknownArchitectureError, naming what is broken or not supported.
    """
    match files.format:
        case ModelFormat.HF_FOLDER | ModelFormat.ORBAX:
            return read_hf_config(files.path)
        case ModelFormat.GGUF:
            return model_config_from_gguf(GgufSource(files.path))


def load_model(
    files: ModelFiles,
    *,
    config: ModelConfig,
    dtype: Dtype,
    mesh: Mesh,
    form: LayerForm = LayerForm.STACKED,
) -> Decoder:
    """The model in `files`, converted to `dtype`, each device of `mesh` reading only its share.

    Raises WeightError naming the file and tensor that is missing, unused or broken.
    """
    model = model_class(config.architecture)
    match files.format:
        case ModelFormat.HF_FOLDER:
            source = SafetensorsSource(files.path)
            names = model.hf_names
            weights = load_weights(source, names, config=config, dtype=dtype, mesh=mesh, form=form)
        case ModelFormat.GGUF:
            source = GgufSource(files.path)
            names = model.gguf_names
            weights = load_weights(source, names, config=config, dtype=dtype, mesh=mesh, form=form)
        case ModelFormat.ORBAX:
            from albireo_jax.nn.checkpoint import restore_weights  # orbax takes a second to import

            weights = restore_weights(files.path, config=config, mesh=mesh, dtype=dtype, form=form)
    return model(config, weights, mesh)


def random_model(
    config: ModelConfig, *, dtype: Dtype, mesh: Mesh, seed: int, form: LayerForm = LayerForm.STACKED
) -> Decoder:
    """A model of this shape with random weights, drawn on the devices; the same at any degree and form."""
    weights = random_weights(config, dtype=dtype, mesh=mesh, seed=seed, form=form)
    return model_class(config.architecture)(config, weights, mesh)


def model_class(architecture: str) -> type[Llama]:
    """Class of an architecture, by its Hugging Face name; its module is named after its `model_type`."""
    if architecture not in ARCHITECTURES:
        raise UnknownArchitectureError(
            f"architecture {architecture!r} is not one of those known: {sorted(ARCHITECTURES)}"
        )
    module = import_module(f"albireo_jax.models.{ARCHITECTURES[architecture].model_type}")
    [model] = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Llama) and value.__module__ == module.__name__
    )
    return model
