"""The OpenAPI document: bodies, answers with their statuses, streams, and the key."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from albireo_jax.serving.auth import OPEN_PATHS
from albireo_jax.serving.schemas.answer_objects import ErrorAnswer
from albireo_jax.serving.schemas.strict_model import StrictModel

_REF = "#/components/schemas/{model}"
_KEY = "apiKey"
_WHEN = {
    HTTPStatus.BAD_REQUEST: "The request is malformed, or asks for what cannot be done.",
    HTTPStatus.UNAUTHORIZED: "The API key is missing or wrong.",
    HTTPStatus.NOT_FOUND: "The model is not served here.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body exceeds the limit.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not JSON, or encoded in an unknown way.",
    HTTPStatus.TOO_MANY_REQUESTS: "Too many requests wait; try again after the seconds of Retry-After.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The answer could not be completed.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The engine is dead, or the server is shutting down.",
}
_OF_BODIES = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)

Responses = dict[int | str, dict[str, Any]]
"""Status -> what FastAPI documents of it."""


def answers(
    model: type[BaseModel] | None, *errors: HTTPStatus, chunk: type[BaseModel] | None = None
) -> Responses:
    """The answers of a route: a `model`, or events that hold a `chunk` each, or one of the `errors`."""
    success: dict[str, Any] = {"description": "Success."}
    if model is not None:
        success["model"] = model
    if chunk is not None:
        success["content"] = {"text/event-stream": {"itemSchema": _event(chunk)}}
    failures: Responses = {
        int(status): {"model": ErrorAnswer, "description": _WHEN[status]} for status in errors
    }
    return {200: success, **failures}


def body_answers(model: type[BaseModel], *, chunk: type[BaseModel] | None = None) -> Responses:
    """The answers of a route that reads a body."""
    return answers(model, *_OF_BODIES, chunk=chunk)


def body_docs(schema: type[StrictModel]) -> dict[str, Any]:
    """The part of a route's document that describes its body."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def document_app(app: FastAPI, *models: type[BaseModel], has_key: bool) -> None:
    """Have `app` describe itself; `models` are the bodies and chunks, which FastAPI does not see."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, models, has_key=has_key)
        return app.openapi_schema

    app.openapi = describe


def _document(app: FastAPI, models: tuple[type[BaseModel], ...], *, has_key: bool) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas |= definitions["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)  # nothing is answered with 422
    if has_key:
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if has_key and path not in OPEN_PATHS:
                operation["security"] = [{_KEY: []}]
                operation["responses"]["401"] = _error(HTTPStatus.UNAUTHORIZED)
            operation["responses"] = dict(sorted(operation["responses"].items()))
    components["schemas"] = dict(sorted(schemas.items()))
    return document


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """An event of a stream, as OpenAPI 3.2 describes events: its data is JSON but for the last one's."""
    objects = [{"$ref": _REF.format(model=model.__name__)} for model in (chunk, ErrorAnswer)]
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": objects}}
    data = {
        "anyOf": [{"const": "[DONE]"}, text],
        "description": f"A {chunk.__name__}, or an ErrorAnswer where the stream is cut, at its end [DONE].",
    }
    return {
        "type": "object",
        "description": "If `stream` is true: an event of the stream.",
        "properties": {"data": data},
        "required": ["data"],
    }


def _error(status: HTTPStatus) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=ErrorAnswer.__name__)}
    return {"description": _WHEN[status], "content": {"application/json": {"schema": schema}}}
