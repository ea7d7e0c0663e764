"""The choice of the attention of an engine's steps."""

import logging

import jax.numpy as jnp
from jax.sharding import Mesh

from albireo_jax.core.config import AttentionBackend, Dtype, KvDtype
from albireo_jax.core.errors import ModelError
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.ops.attention_cuda import check_shape
from albireo_jax.ops.cuda.kernels import architecture_of, launch_on
from albireo_jax.runtime.state import PAGE_DTYPES
from albireo_jax.runtime.step_attention import BY_OPERATIONS, AttentionByKernels, StepAttention

_logger = logging.getLogger(__name__)


def choose_attention(
    backend: AttentionBackend, model: ModelConfig, mesh: Mesh, *, dtype: Dtype, kv_dtype: KvDtype
) -> StepAttention:
    """The attention of a step program: by CUDA kernels, or by operations of XLA.

    Raises ModelError, with the reason, where kernels are asked for and cannot be had. Where they are only
    preferred, the reason is logged.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    if backend is AttentionBackend.XLA or (backend is AttentionBackend.AUTO and platform != "gpu"):
        return BY_OPERATIONS
    try:
        if platform != "gpu":
            raise ModelError(f"attention {backend.value} needs NVIDIA GPUs, not devices of kind {platform}")
        check_shape(
            head_dim=model.head_dim,
            group=model.num_heads // model.kv_heads_at(mesh.size),
            q_dtype=jnp.dtype(dtype.value),
            kv_dtype=PAGE_DTYPES[kv_dtype.resolve(dtype)],
        )
    except ModelError as reason:
        if backend is AttentionBackend.CUDA:
            raise
        _logger.warning("attention is made of operations of XLA: %s", reason)
        return BY_OPERATIONS
    return AttentionByKernels(launch_on(architecture_of(device)))
