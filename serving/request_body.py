"""Read a request's JSON body strictly: size, content type, syntax, then the schema's types."""

import reprlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from albireo_jax.engine.thread_pools import BoundedPool
from albireo_jax.serving.api_errors import ApiError, bad_request
from albireo_jax.serving.body_decoding import Writing
from albireo_jax.serving.json_size import check_json_size
from albireo_jax.serving.schemas.strict_model import StrictModel

_SHORT_BODY_BYTES = 2**16
"""A longer body is read by another thread, so that streams go on meanwhile."""

Schema = TypeVar("Schema", bound=StrictModel)


def json_body(schema: type[Schema]) -> Callable[[Request], Awaitable[Schema]]:
    """A dependency that gives the request's body as a `schema`.

    Not FastAPI's own body parameter: that accepts NaN and answers 422. Raises ApiError 413 beyond the
    app's `max_body_bytes`, 415 for another content type or an unknown encoding, 400 for what is not as the
    schema says.
    """

    async def read(request: Request) -> Schema:
        max_bytes: int = request.app.state.max_body_bytes
        written = Writing.of(request.headers)
        body = await _read_bytes(request, max_bytes)
        if len(body) <= _SHORT_BODY_BYTES and not written.encodings:
            return parse_body(written.json_text(body, max_bytes=max_bytes), schema)
        pool: BoundedPool = request.app.state.body_pool
        return await pool.run(lambda: parse_body(written.json_text(body, max_bytes=max_bytes), schema))

    return read


def parse_body(body: bytes, schema: type[Schema]) -> Schema:
    """A `schema` from JSON text; raises ApiError 400 that names the field."""
    try:
        check_json_size(body)
    except ValueError as error:
        raise bad_request(str(error)) from error
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, got {reprlib.repr(value)}")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        place = ".".join(map(str, first["loc"]))
        param = place or schema.field_in(message)
        raise bad_request(f"{place}: {message}" if place else message, param=param) from error


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > max_bytes:
        raise _too_large(max_bytes)  # before any of it is read
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as error:
        raise bad_request("the client left before its body was read") from error
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body exceeds the limit of {max_bytes} bytes",
        code="body_too_large",
    )
