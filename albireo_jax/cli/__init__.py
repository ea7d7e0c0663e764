"""The `albireo` command line."""

from albireo_jax.cli.app import main

__all__ = ["main"]
