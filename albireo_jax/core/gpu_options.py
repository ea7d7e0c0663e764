"""Choices of how an engine's programs are made for GPUs; all give the same tokens."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypedDict

from albireo_jax.core import checks
from albireo_jax.core.options import Option


class LayerForm(StrEnum):
    """The form of the layers' weights on the devices: one array for all layers, or one for each layer."""

    STACKED = "stacked"
    UNSTACKED = "unstacked"


class ProductLibrary(StrEnum):
    """The maker of a GPU's matrix products: XLA's own kernels in Triton, or NVIDIA's cuBLASLt.

    XLA times its own kernels for each distinct product when it compiles that, and they can widen codes of one
    byte as they read them; cuBLASLt picks among finished kernels.
    """

    TRITON = "triton"
    CUBLASLT = "cublaslt"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """Settings of programs for GPUs; None takes what suits the devices and the weights.

    `layer_form` is by default UNSTACKED on GPUs; a CPU that is given none keeps stacked weights, and reads
    copies of single layers where the model has few. `product_library` is by default CUBLASLT for unquantised
    weights, and for fp8 where GPUs multiply that, else TRITON for codes; it changes nothing on CPUs.
    `cuda_graph_collectives` records the collectives of several GPUs into the CUDA graphs of their steps, so
    that a step is one launch; others report that NCCL may hang in graphs, so it is off by default.
    """

    layer_form: LayerForm | None = None
    product_library: ProductLibrary | None = None
    cuda_graph_collectives: Annotated[
        bool, Option(help="Record collectives into CUDA graphs; NCCL is said to hang there at times.")
    ] = False

    def __post_init__(self) -> None:
        """Refuse names of no form or library."""
        form = checks.optional_choice("layer_form", self.layer_form, LayerForm)
        library = checks.optional_choice("product_library", self.product_library, ProductLibrary)
        graphs = checks.flag("cuda_graph_collectives", self.cuda_graph_collectives)
        object.__setattr__(self, "cuda_graph_collectives", graphs)
        object.__setattr__(self, "layer_form", form)
        object.__setattr__(self, "product_library", library)


class GpuOverrides(TypedDict, total=False):
    """Keyword arguments that set a `GpuConfig`."""

    cuda_graph_collectives: bool
