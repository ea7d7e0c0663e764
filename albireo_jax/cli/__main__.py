"""`python -m albireo_jax.cli`."""

from albireo_jax.cli.commands import main

main()
