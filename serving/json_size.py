"""Bounds on what a JSON text may hold, checked before it is parsed.

The parser holds the GIL from the first byte to the last, and makes an object of each value.
"""

import numpy as np

TEXT_LIMITS = {"objects and lists": 2**15, "members": 2**17, "values": 2**20}
"""The most that a JSON text may hold."""

_BLOCK_BYTES = 2**20


def check_json_size(text: bytes) -> None:
    """Raise ValueError if a JSON text holds more values than a body may; costs little, whatever it holds."""
    at_most = {
        "objects and lists": text.count(b"[") + text.count(b"{"),
        "members": text.count(b":"),
        "values": text.count(b",") + 1,
    }
    if all(at_most[things] <= most for things, most in TEXT_LIMITS.items()):
        return
    for things, count in _count_outside_strings(text).items():
        if count > TEXT_LIMITS[things]:
            raise ValueError(f"the body holds {count} JSON {things}, the limit is {TEXT_LIMITS[things]}")


def _count_outside_strings(text: bytes) -> dict[str, int]:
    """Marks of JSON that are not inside strings; by NumPy, which lets other threads go on."""
    if b"\\" in text:  # the only quotes that are left then are those that begin or end a string
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    totals = dict.fromkeys(b"[{:,", 0)
    is_inside = np.uint8(0)
    for begin in range(0, len(text), _BLOCK_BYTES):
        block = np.frombuffer(text[begin : begin + _BLOCK_BYTES], np.uint8)
        inside = np.cumsum(block == ord('"'), dtype=np.uint8) + is_inside & 1  # an odd count of quotes
        is_inside = inside[-1]
        counts = np.bincount(block[inside == 0], minlength=256)
        for mark in totals:
            totals[mark] += int(counts[mark])
    opened, named, separated = totals[ord("[")] + totals[ord("{")], totals[ord(":")], totals[ord(",")]
    return {"objects and lists": opened, "members": named, "values": separated + 1}
