"""LLM inference and serving on JAX: overlapped scheduling and sequence-parallel sampling."""

from typing import TYPE_CHECKING, Any

from albireo_jax.core.types import SamplingParams

if TYPE_CHECKING:
    from albireo_jax.api import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import `LLM`, and JAX with it, only when it is asked for: the control plane does without."""
    if name == "LLM":
        from albireo_jax.api import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
