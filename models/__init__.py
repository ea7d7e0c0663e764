if __name__ != "albireo_jax.models":
    raise ImportError(
        "import albireo_jax.models: this folder is part of the albireo_jax package, not a package of its own"
    )
