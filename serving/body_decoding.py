"""A body's bytes as JSON text in UTF-8: decompressed, and out of another encoding of characters."""

import json
import re
import zlib
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus

from starlette.datastructures import Headers

from albireo_jax.serving.api_errors import ApiError, bad_request

_JSON = re.compile(r"application/(json|[\w.!#$&^-]+\+json)")
_COMPRESSIONS = {"gzip": 31, "x-gzip": 31, "deflate": 47}
"""Content encoding -> zlib's window bits: a gzip header, or one of both."""

_MAX_LAYERS = 2
"""Compressions on top of each other."""

_MAX_MEMBERS = 64
"""Of a gzip body; each costs a copy of those behind it."""

_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii", "utf-16", "utf-16le", "utf-16be", "utf-32", "iso-8859-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """A body's compressions, outermost last, and its character set if the client named one."""

    encodings: tuple[str, ...]
    charset: str

    @classmethod
    def of(cls, headers: Headers) -> "Writing":
        """The writing that headers tell; raises ApiError 415 for one that is not understood, or no JSON."""
        names = [name.strip().lower() for name in headers.get("content-encoding", "").split(",")]
        encodings = tuple(name for name in names if name not in ("", "identity"))
        if len(encodings) > _MAX_LAYERS:
            raise _unsupported(f"{len(encodings)} content encodings, the limit is {_MAX_LAYERS}")
        for encoding in encodings:
            if encoding not in _COMPRESSIONS:
                raise _unsupported(
                    f"the content encoding must be one of {', '.join(_COMPRESSIONS)}, got {encoding}",
                    headers={"Accept-Encoding": ", ".join(_COMPRESSIONS)},
                )
        return cls(encodings=encodings, charset=_charset(headers.get("content-type", "")))

    def json_text(self, body: bytes, *, max_bytes: int) -> bytes:
        """The JSON text of a body in UTF-8.

        Raises ApiError 413 if it exceeds `max_bytes`, 400 for a body that is not written so.
        """
        for encoding in reversed(self.encodings):
            body = _decompressed(body, encoding, max_bytes=max_bytes)
        return _in_utf8(body, self.charset)


def _charset(content_type: str) -> str:
    """The charset of a JSON content type, empty if none is told; raises ApiError 415 for another type."""
    header = Message()
    header["content-type"] = content_type
    kind = content_type.partition(";")[0].strip().lower()
    if not _JSON.fullmatch(kind):
        raise _unsupported(f"the content type must be application/json, got {kind or 'none'}")
    charset = (header.get_content_charset() or "").lower()
    if charset and charset not in _CHARSETS:
        raise _unsupported(f"the charset must be one of {', '.join(_CHARSETS)}, got {charset}")
    return charset


def _decompressed(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    bits = _COMPRESSIONS[encoding]
    if encoding == "deflate" and not _has_zlib_header(body):
        bits = -zlib.MAX_WBITS  # some clients leave the header out
    text = bytearray()
    try:
        for _ in range(_MAX_MEMBERS):
            member = zlib.decompressobj(bits)
            text += member.decompress(body, max_bytes + 1 - len(text))
            if len(text) > max_bytes:
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"the body exceeds the limit of {max_bytes} bytes once it is decompressed",
                    code="body_too_large",
                )
            if not member.eof:
                raise bad_request(f"the body ends in the middle of its {encoding} data")
            body = member.unused_data
            if not body:
                return bytes(text)
    except zlib.error as error:
        raise bad_request(f"the body is not valid {encoding} data: {error}") from error
    raise bad_request(f"the body has more than {_MAX_MEMBERS} {encoding} members")


def _has_zlib_header(body: bytes) -> bool:
    return len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0


def _in_utf8(body: bytes, charset: str) -> bytes:
    """A text in UTF-8 without a byte order mark; its encoding is told by the charset or its first bytes."""
    encoding = charset if charset not in ("", "utf-8", "utf8") else json.detect_encoding(body[:8])
    if encoding == "utf-8":
        return body
    if encoding == "utf-8-sig":
        return body.removeprefix(b"\xef\xbb\xbf")
    try:
        return body.decode(encoding).removeprefix("\ufeff").encode()
    except UnicodeError as error:
        raise bad_request(f"the body is not valid {encoding}: {error}") from error


def _unsupported(message: str, *, headers: dict[str, str] | None = None) -> ApiError:
    return ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, message, headers=headers)
