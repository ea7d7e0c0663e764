"""Mistral 7B and models of its make."""

from albireo_jax.models.llama import Llama


class Mistral(Llama):
    """Llama with a sliding window in every layer, where the configuration has one."""
