"""GET /docs: the OpenAPI document as a page that needs no script and no other server."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter()

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { background: #8882; padding: 0.8em; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8884; padding: 0.2em 0.8em 0.2em 0; vertical-align: top; }
h2 { border-bottom: 2px solid #8886; margin-top: 2em; }
:root { color-scheme: light dark; }
"""


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The routes, their bodies and their answers."""
    document = request.app.openapi()
    return HTMLResponse(render(document, base_url=str(request.base_url).rstrip("/")))


def render(document: dict[str, Any], *, base_url: str) -> str:
    """The page of an OpenAPI document."""
    title = escape(document["info"]["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<h1>{title} {escape(document['info']['version'])}</h1>",
        "<p>The same as data: <a href=openapi.json><code>/openapi.json</code></a>.</p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(document, f"{method.upper()} {path}", operation, base_url=base_url)
    parts.append("<h1>Objects</h1>")
    for name, schema in document["components"]["schemas"].items():
        parts += _schema(name, schema)
    return "\n".join(parts)


def _operation(
    document: dict[str, Any], name: str, operation: dict[str, Any], *, base_url: str
) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    command = f"curl {base_url}{name.partition(' ')[2]}"
    if "security" in operation:
        command += " -H 'Authorization: Bearer KEY'"
    body = operation.get("requestBody")
    if body is not None:
        schema = body["content"]["application/json"]["schema"]
        named = schema["$ref"].rpartition("/")[2]
        required = document["components"]["schemas"][named].get("required", [])
        example = {field: _EXAMPLES.get(field, "…") for field in required}
        command += f" -H 'Content-Type: application/json' -d '{json.dumps(example)}'"
        yield f"<p>Body: {_kind(schema)}</p>"
    yield f"<pre>{escape(command)}</pre><table>"
    for status, answer in sorted(operation["responses"].items()):
        for kind, content in sorted(answer.get("content", {}).items()) or [("", {})]:
            schema = content.get("schema", content.get("itemSchema", {}))
            about = escape(schema.get("description") or answer.get("description", ""))
            yield f"<tr><td>{status}<td>{escape(kind)}<td>{_kind(schema)}<td>{about}"
    yield "</table>"


_EXAMPLES = {
    "prompt": "Once upon a time",
    "messages": [{"role": "user", "content": "Hello"}],
    "tokens": [1, 2, 3],
}


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    about = escape(schema.get("description", "")).replace("\n\n", "<p>")
    yield f"<h3 id={escape(name)}><code>{escape(name)}</code></h3><p>{about}</p><table>"
    required = schema.get("required", [])
    for field, value in schema.get("properties", {}).items():
        must = "required" if field in required else ""
        yield f"<tr><td><code>{escape(field)}</code><td>{_kind(value)}<td>{must}"
    yield "</table>"


def _kind(schema: dict[str, Any]) -> str:
    """The type of a value, in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(_kind(part) for part in schema[union])
    if "enum" in schema:
        return " or ".join(escape(json.dumps(value)) for value in schema["enum"])
    if "const" in schema:
        return escape(json.dumps(schema["const"]))
    kind = escape(str(schema.get("type", "any")))
    if kind == "array":
        most = f" up to {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of{most} {_kind(schema.get('items', {}))}"
    limits = [f"{word} {schema[key]}" for key, word in _LIMITS.items() if key in schema]
    return f"{kind} ({escape(', '.join(limits))})" if limits else kind


_LIMITS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minLength": "characters ≥",
    "maxLength": "characters ≤",
    "maxProperties": "entries ≤",
}
