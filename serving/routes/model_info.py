"""GET /v1/models, /version, /health, /ping and /load: the model that is served, and how it does."""

from http import HTTPStatus
from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from albireo_jax.serving.api_errors import check_model
from albireo_jax.serving.dependencies import EngineDependency
from albireo_jax.serving.openapi import answers
from albireo_jax.serving.schemas.answer_objects import Health, Load, ModelCard, ModelList, Version

router = APIRouter()


@router.get("/v1/models", responses=answers(ModelList))
async def list_models(request: Request, engine: EngineDependency) -> Response:
    """The one model that is served."""
    return JSONResponse({"object": "list", "data": [_model(request, engine)]})


@router.get("/v1/models/{model:path}", responses=answers(ModelCard, HTTPStatus.NOT_FOUND))
async def retrieve_model(model: str, request: Request, engine: EngineDependency) -> Response:
    """The model of a name; 404 if another is served."""
    check_model(model, engine.served_name)
    return JSONResponse(_model(request, engine))


@router.get("/version", responses=answers(Version))
async def show_version() -> Response:
    """The version of this server."""
    return JSONResponse({"version": version("albireo-jax")})


@router.get("/load", responses=answers(Load))
async def load(engine: EngineDependency) -> Response:
    """Requests that are open, running or waiting; for load balancers."""
    stats = engine.service.stats()
    return JSONResponse({"server_load": stats.running + stats.finishing + stats.waiting})


@router.post("/ping", responses=answers(Health, HTTPStatus.SERVICE_UNAVAILABLE))
@router.get("/ping", responses=answers(Health, HTTPStatus.SERVICE_UNAVAILABLE))
@router.get("/health", responses=answers(Health, HTTPStatus.SERVICE_UNAVAILABLE))
async def health(engine: EngineDependency) -> Response:
    """200 while requests are taken; 503 with the reason when the engine is dead or stopped."""
    engine.service.check_running()
    return JSONResponse({"status": "ok"})


def _model(request: Request, engine: EngineDependency) -> dict[str, object]:
    return {
        "id": engine.served_name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "albireo_jax",
        "root": engine.served_name,
        "parent": None,
        "max_model_len": engine.limits.max_sequence_len,
    }
