"""OpenAI's error bodies, for everything that can go wrong with a request."""

import json
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from albireo_jax.core.errors import ContextLengthError, EngineDeadError, EngineStartingError, OverloadedError
from albireo_jax.serving.schemas.strict_model import StrictModel

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = "1"
"""When a client may try again to whom the server was too busy."""

_LOADING_RETRY_AFTER_S = "5"

_MAX_MESSAGE_BYTES = 1500
_MAX_PARAM_BYTES = 200
"""Of JSON: messages quote what a client sent, which may be megabytes."""

_SHOWN_CHARACTERS = 500
"""Of a text that an error quotes."""


class ApiError(Exception):
    """A request that is answered with an error: its status, and what OpenAI's error object says.

    What is longer than an error body may be loses its middle.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = shorten(message, _MAX_MESSAGE_BYTES)
        super().__init__(self.message)
        self.status = status
        self.type = type
        self.param = None if param is None else shorten(param, _MAX_PARAM_BYTES)
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer to the request."""
        return _ErrorResponse(self.body(), self.status, headers=self.headers)


class _ErrorResponse(JSONResponse):
    """JSON in UTF-8, whatever is quoted in it: half a surrogate pair becomes a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong: 400."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def engine_dead(error: EngineDeadError) -> ApiError:
    """Nothing more is served, or nothing yet: 503."""
    if isinstance(error, EngineStartingError):
        return loading(str(error))
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, str(error), type="service_unavailable_error", code="engine_dead"
    )


def loading(message: str) -> ApiError:
    """The model is not there yet: 503."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        type="service_unavailable_error",
        code="loading",
        headers={"Retry-After": _LOADING_RETRY_AFTER_S},
    )


def overloaded(error: OverloadedError) -> ApiError:
    """Too much work of a kind waits: 429."""
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        str(error),
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": _RETRY_AFTER_S},
    )


def shutting_down() -> ApiError:
    """The answer is cut because the server stops: 503."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "the server is shutting down; the answer was not completed",
        type="service_unavailable_error",
        code="shutting_down",
        headers={"Retry-After": _RETRY_AFTER_S},
    )


def answer_failed() -> ApiError:
    """The engine gave up this answer and goes on with others: 500."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "the answer could not be completed: its logits were not finite, or what it must look like became "
        "too complex",
        type="server_error",
        code="answer_failed",
    )


def internal_error() -> ApiError:
    """A bug of ours, told without its traceback: 500."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal server error", type="server_error")


def shorten(text: str, max_bytes: int) -> str:
    """A text of which the middle is left out if its JSON is longer than `max_bytes`."""
    if len(text) <= max_bytes and len(json.dumps(text)) - 2 <= max_bytes:
        return text
    head = _fitting(text, max_bytes * 2 // 3)
    tail = _fitting(text[: -max_bytes - 1 : -1], max_bytes // 4)
    left_out = len(text) - head - tail
    return f"{text[:head]} … [{left_out} characters] … {text[len(text) - tail :]}"


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that `app` can answer an OpenAI error body."""

    @app.exception_handler(ApiError)
    async def answer_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(EngineDeadError)
    async def answer_engine_dead(_: Request, error: EngineDeadError) -> JSONResponse:
        return engine_dead(error).response()

    @app.exception_handler(OverloadedError)
    async def answer_overloaded(_: Request, error: OverloadedError) -> JSONResponse:
        return overloaded(error).response()

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return bad_request(first["msg"], param=".".join(map(str, first["loc"][1:])) or None).response()

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        status = HTTPStatus(error.status_code)
        headers = error.headers
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(_methods(request))}
        return ApiError(status, message, headers=headers).response()

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> JSONResponse:
        name = request.scope.get("state", {}).get("request_id")
        _log.error("request %s, %s %s, failed", name, request.method, request.url.path, exc_info=error)
        return internal_error().response()


@contextmanager
def value_errors_as_400(schema: type[StrictModel]) -> Generator[None, None, None]:
    """Turn a ValueError into an ApiError 400; its `param` is the field that begins the message."""
    try:
        yield
    except ContextLengthError as error:
        raise bad_request(str(error), code="context_length_exceeded") from error
    except ValueError as error:
        raise bad_request(str(error), param=schema.field_in(str(error))) from error


def check_model(asked: str | None, served_name: str) -> None:
    """Raise ApiError 404 if a client asks for another model; who names none gets ours."""
    if asked is not None and asked != served_name:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"the model {asked[:_SHOWN_CHARACTERS]!r} does not exist; this server serves {served_name!r}",
            param="model",
            code="model_not_found",
        )


def _methods(request: Request) -> list[str]:
    """The methods of a path: several routes may share it, and Starlette tells those of the first alone."""
    app: FastAPI = request.app
    scopes = {method.value: {**request.scope, "method": method.value} for method in HTTPMethod}
    return sorted(
        method
        for method, scope in scopes.items()
        if any(route.matches(scope)[0] is Match.FULL for route in app.routes)
    )


def _fitting(text: str, max_bytes: int) -> int:
    """Characters from the beginning of a text whose JSON, non-ASCII escaped, fits."""
    size = count = 0
    for character in text:
        size += len(json.dumps(character)) - 2
        if size > max_bytes:
            break
        count += 1
    return count
