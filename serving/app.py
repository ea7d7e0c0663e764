"""The HTTP app: OpenAI's routes over a running engine."""

import time
from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI

from albireo_jax.engine.thread_pools import BoundedPool
from albireo_jax.serving.api_errors import install_error_handlers
from albireo_jax.serving.auth import ApiKeyMiddleware, check_api_key
from albireo_jax.serving.cors import ALL_ORIGINS, add_cors
from albireo_jax.serving.dependencies import ServedEngine
from albireo_jax.serving.lenient_paths import LenientPathsMiddleware
from albireo_jax.serving.openapi import document_app
from albireo_jax.serving.request_id import RequestIdMiddleware
from albireo_jax.serving.routes import (
    chat_completions,
    completions,
    docs_page,
    model_info,
    prometheus,
    tokenization,
)
from albireo_jax.serving.schemas.answer_objects import ChatChunk
from albireo_jax.serving.schemas.chat_bodies import ChatBody, TokenizeBody
from albireo_jax.serving.schemas.completion_bodies import CompletionBody, DetokenizeBody
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat, answer_format

MAX_BODY_BYTES = 16 * 2**20


def create_app(
    engine: ServedEngine,
    *,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    tool_call_parser: ToolFormat | None = None,
    reasoning_parser: ReasoningFormat | None = None,
    allow_origins: Sequence[str] = ALL_ORIGINS,
    stream_interval: int = 1,
) -> FastAPI:
    """An app that serves `engine`, which stays the caller's to close.

    With an `api_key` every route asks for it but those of probes and scrapers (`auth.OPEN_PATHS`). Bodies
    beyond `max_body_bytes` are refused. How the model writes tool calls and reasoning is told by its chat
    template, unless given.
    A stream's events bring `stream_interval` tokens at least, but the first and the last.
    Pages of `allow_origins` in a browser may read the answers, by default all.
    Raises ValueError for a key that no client could send, and for what is no origin.
    """
    if api_key is not None:
        check_api_key(api_key)  # the middleware is not made before the first request
    app = FastAPI(title="albireo_jax", version=version("albireo-jax"), docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.answer_format = answer_format(
        engine.tokenizer.chat_template_source, tools=tool_call_parser, reasoning=reasoning_parser
    )
    app.state.stream_interval = stream_interval
    app.state.created = int(time.time())
    app.state.max_body_bytes = max_body_bytes
    app.state.body_pool = BoundedPool("reading of bodies", threads=1, max_queued=64)
    for routes in (completions, chat_completions, model_info, tokenization, prometheus, docs_page):
        app.include_router(routes.router)
    bodies = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
    document_app(app, *bodies, ChatChunk, has_key=api_key is not None)
    install_error_handlers(app)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    app.add_middleware(LenientPathsMiddleware)
    app.add_middleware(RequestIdMiddleware)
    add_cors(app, allow_origins)
    return app
