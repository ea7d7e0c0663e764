if __name__ != "albireo_jax.serving":
    raise ImportError(
        "import albireo_jax.serving: this folder is part of the albireo_jax package, not a package of its own"
    )
