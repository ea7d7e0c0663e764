"""A GGUF header read by hand agrees with the gguf package, and a damaged one is refused."""

import struct
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


def test_odd_values_that_nobody_needs_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_array("nested.texts", [["a"], ["b", "c"]])
    writer.add_key_value("latin1", b"caf\xe9", gguf.GGUFValueType.STRING)
    writer.add_array("many", list(range(300_000)))
    writer.add_uint32("last", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_gguf_metadata(tmp_path / "odd.gguf")
    assert metadata["nested"] == [[1, 2], [3]]
    assert metadata["nested.texts"] == [["a"], ["b", "c"]]
    assert str(metadata["latin1"]).encode(errors="surrogateescape") == b"caf\xe9"
    assert metadata["last"] == 7


def _value(kind: int, data: bytes) -> bytes:
    """A file with one key, `odd`, of a kind."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return header + struct.pack("<Q", 3) + b"odd" + struct.pack("<I", kind) + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_value(13, b"12345678"), "odd: value type 13 is unknown"),
        (_value(9, struct.pack("<IQ", 13, 1)), "odd: value type 13 is unknown"),
        (_value(9, struct.pack("<IQ", 4, 2**62)), f"odd: an array of {2**62} numbers runs past the end"),
        (_value(9, struct.pack("<IQ", 8, 2**62)), "odd.gguf is not a readable"),
        (_value(9, struct.pack("<IQ", 9, 1) * 2000), "odd: arrays are nested more than 8 deep"),
        (_value(8, struct.pack("<Q", 2**63)), f"odd: a string of {2**63} bytes runs past the end"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_by_its_key(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "odd.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_gguf_metadata(tmp_path / "odd.gguf")


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
