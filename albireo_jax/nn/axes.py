"""The glossary of axes: one letter per axis, used as the suffix of every array's name.

`wqkv_LDNXK` has the axes L, D, N, X, K in this order. The suffix is the only declaration: shapes, shardings,
loading and checkpoints all read it.
"""

AXES = {
    "T": "tokens",  # of a step, packed row after row
    "R": "rows",  # requests of a step
    "C": "context",  # cached tokens
    "D": "model",
    "F": "feed_forward",
    "N": "kv_heads",
    "G": "queries_per_kv_head",
    "J": "query_heads",  # N * G
    "A": "query_width",  # J * K
    "X": "queries_key_value",  # G query heads, then their key head, then their value head
    "K": "head",  # width of one head
    "H": "rotated_pairs",  # K / 2
    "V": "vocabulary",
    "L": "layers",
    "P": "pages",
    "S": "page_tokens",
    "2": "pair",  # gate and up, or key and value
}
"""Axis letter -> logical axis name. Lower case (r, v) is this rank's share of an axis."""


def axes_of(name: str) -> str:
    """Axis letters of an array, from the suffix of its name: "LDF" of "w_up_LDF"."""
    letters = name.rpartition("_")[2]
    unknown = [letter for letter in letters if letter not in AXES]
    if unknown or not letters:
        raise ValueError(f"array name {name!r} does not end in axis letters; those are {''.join(AXES)}")
    return letters


def has_layers(name: str) -> bool:
    """Whether the first axis of an array is that of layers."""
    return axes_of(name).startswith("L")


def logical_axes(name: str) -> tuple[str, ...]:
    """Logical axis names of an array, from the suffix of its name."""
    return tuple(AXES[letter] for letter in axes_of(name))
