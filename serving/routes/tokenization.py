"""POST /tokenize and /detokenize, in the shapes that vLLM's server gave them."""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import JSONResponse, Response

from albireo_jax.serving.api_errors import bad_request, check_model, value_errors_as_400
from albireo_jax.serving.chat_requests import render_chat
from albireo_jax.serving.dependencies import EngineDependency, FormatDependency
from albireo_jax.serving.engine_calls import encode
from albireo_jax.serving.openapi import body_answers, body_docs
from albireo_jax.serving.request_body import json_body
from albireo_jax.serving.schemas.answer_objects import DetokenizeAnswer, TokenizeAnswer
from albireo_jax.serving.schemas.chat_bodies import TokenizeBody
from albireo_jax.serving.schemas.completion_bodies import DetokenizeBody

router = APIRouter()


@router.post("/tokenize", openapi_extra=body_docs(TokenizeBody), responses=body_answers(TokenizeAnswer))
async def tokenize(
    engine: EngineDependency,
    format: FormatDependency,
    body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))],
) -> Response:
    """Token ids of a text, or of a conversation as a chat with the same fields renders it."""
    check_model(body.model, engine.served_name)
    with value_errors_as_400(TokenizeBody):
        if body.prompt is None:
            text, special = await render_chat(engine.tokenizer, format, body), False
        else:
            text, special = body.prompt, body.add_special_tokens is not False
        tokens = await encode(engine.frontend, text, add_special_tokens=special)
    texts = [engine.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": engine.limits.max_sequence_len,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


@router.post("/detokenize", openapi_extra=body_docs(DetokenizeBody), responses=body_answers(DetokenizeAnswer))
async def detokenize(
    engine: EngineDependency, body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))]
) -> Response:
    """Text of token ids, special tokens spelled out."""
    check_model(body.model, engine.served_name)
    for token in body.tokens:
        if not 0 <= token < engine.limits.vocab_size:
            raise bad_request(
                f"tokens: id {token} is outside the vocabulary of {engine.limits.vocab_size}", param="tokens"
            )
    return JSONResponse({"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)})
