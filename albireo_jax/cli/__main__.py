"""`python -m albireo_jax.cli`."""

from albireo_jax.cli.app import main

main()
