"""OpenAI's error bodies, for everything that can go wrong with a request."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from albireo_jax.core.errors import EngineDeadError, OverloadedError

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = "1"
"""When a client may try again to whom the server was too busy."""


class ApiError(Exception):
    """A request that is answered with an error: its status, and what OpenAI's error object says."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """What the caller asked for is wrong: 400."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def engine_dead(error: EngineDeadError) -> ApiError:
    """Nothing more is served: 503."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, str(error), type="service_unavailable_error", code="engine_dead"
    )


def overloaded(error: OverloadedError) -> ApiError:
    """Too much work of a kind waits: 429."""
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), type="rate_limit_error", code="overloaded")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that `app` can answer an OpenAI error body."""

    @app.exception_handler(ApiError)
    async def answer_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(EngineDeadError)
    async def answer_engine_dead(_: Request, error: EngineDeadError) -> JSONResponse:
        dead = engine_dead(error)
        return JSONResponse(dead.body(), dead.status)

    @app.exception_handler(OverloadedError)
    async def answer_overloaded(_: Request, error: OverloadedError) -> JSONResponse:
        busy = overloaded(error)
        return JSONResponse(busy.body(), busy.status, headers={"Retry-After": _RETRY_AFTER_S})

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        wrong = bad_request(first["msg"], param=".".join(map(str, first["loc"][1:])) or None)
        return JSONResponse(wrong.body(), wrong.status)

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        answer = ApiError(HTTPStatus(error.status_code), message)
        return JSONResponse(answer.body(), answer.status, headers=error.headers)

    @app.exception_handler(Exception)
    async def answer_bug(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        bug = ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal server error", type="server_error")
        return JSONResponse(bug.body(), bug.status)
