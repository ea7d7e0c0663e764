"""Scrapes the metrics of a simulated engine, as Prometheus does."""

import asyncio

import httpx

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process


def scraped(engine: Lab, *bodies: dict[str, object], accept: str = "text/plain") -> httpx.Response:
    """/metrics after the bodies were answered, all at once."""

    async def main() -> httpx.Response:
        async with in_process(create_app(engine)) as client:
            await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return await client.get("/metrics", headers={"Accept": accept})

    return asyncio.run(main())
