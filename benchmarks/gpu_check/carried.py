"""Files that one run hands on to the next: tuned products, programs compiled and as text, the best form.

All of it is one archive in the output folder, no larger than a file may be that a machine gives back. Of
compiled programs there are as many as fit.

::

    carried/ target.textproto, form.json, hlo/…  ┐
    HOME/.cache/albireo_jax/…                    ┴──pack──▶ OUTPUT/carried.tar.gz ──unpack──▶ the same
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path

ARCHIVE, TARGET, FORM, HLO = "carried.tar.gz", "target.textproto", "form.json", "hlo"
"""Names of the archive and, in the folder, of the device's description, the best form and programs' texts."""

MAX_BYTES = 15 * 2**20
_CACHE = ".cache"
_TUNED = "autotune"


def pack(archive: Path, *, folder: Path, home: Path, max_bytes: int = MAX_BYTES) -> None:
    """Write the archive anew; what is tuned goes first, then the smallest files, as many as fit."""
    new = archive.with_suffix(".new")
    left_bytes = max_bytes
    with tarfile.open(new, "w:gz", compresslevel=1) as tar:
        for path, name in sorted(
            _files(folder, home), key=lambda each: (_rank(each[1]), each[0].stat().st_size)
        ):
            left_bytes -= path.stat().st_size
            if left_bytes < 0:
                break
            tar.add(path, arcname=name)
    new.replace(archive)


def unpack(archive: Path, *, folder: Path, home: Path) -> None:
    """Put back what an earlier run packed."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            top, _, rest = member.name.partition("/")
            member.name = rest
            tar.extract(member, {"carried": folder, "home": home}[top], filter="data")


def _files(folder: Path, home: Path) -> Iterator[tuple[Path, str]]:
    """Files to be packed, each with its name in the archive."""
    for top, root, below in (("carried", folder, folder), ("home", home, home / _CACHE)):
        for path in below.rglob("*"):
            if path.is_file():
                yield path, f"{top}/{path.relative_to(root)}"


def _rank(name: str) -> int:
    return 0 if name.startswith("carried/") else 1 if _TUNED in name else 2
