"""The `albireo` command line."""

from albireo_jax.cli.commands import main

__all__ = ["main"]
