"""A GGUF header read by hand agrees with the gguf package, and a damaged one is refused."""

from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.errors import ModelError
from albireo_jax.core.gguf_metadata import read_gguf_metadata


def _write(path: Path, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> None:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("bool", True)
    writer.add_string("text", "▁naïve 🙂")
    writer.add_array("texts", ["", "a", "é\n"])
    writer.add_array("numbers", [1, 2, -3])
    writer.add_array("floats", [0.25, -1.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "all_types.gguf"
    _write(path)
    return path.read_bytes()


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_equals_the_gguf_package(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = tmp_path / "all_types.gguf"
    _write(path, endian)
    fields = gguf.GGUFReader(path).fields
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    metadata = read_gguf_metadata(path)
    assert metadata == expected
    assert metadata["u64"] == 2**63 + 1
    assert metadata["texts"] == ["", "a", "é\n"]
    assert metadata["bool"] is True


@settings(deadline=None, derandomize=True)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(
    gguf_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    last_value = gguf_bytes.rindex(b"floats")  # what follows the last value is padding
    path.write_bytes(gguf_bytes[: int(share * (last_value + len(b"floats") + 4 + 4 + 8 + 8))])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        read_gguf_metadata(path)


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, b"\x09\x00\x00\x00", "version 9"),
        (24, b"\xff" * 8, "runs past the end"),
    ],
)
def test_a_damaged_header_is_refused(
    gguf_bytes: bytes, tmp_path: Path, *, offset: int, replacement: bytes, message: str
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(gguf_bytes[:offset] + replacement + gguf_bytes[offset + len(replacement) :])
    with pytest.raises(ModelError, match=message):
        read_gguf_metadata(path)
