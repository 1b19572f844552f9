"""The application: which path is answered by what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from core import __version__
from core.messages import EngineError, RequestRejected
from core.observe import AccessLog, Metrics
from core.openai import docs_page, openapi
from core.openai.auth import ApiKeys
from core.openai.backend import Backend
from core.openai.endpoints import HTML, PLAIN, Call, Endpoint, Generation, NoPath, Read, Surroundings, WrongMethod
from core.openai.exchange import Exchange
from core.openai.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from core.openai.responses import Health, Version
from core.openai.settings import HttpSettings
from core.openai.watch import Watch

Endpoints = list[tuple[list[str], Endpoint]]
"""Endpoints with the methods that each takes."""


def create_app(
    backend: Backend,
    settings: HttpSettings | None = None,
    *,
    metrics: Metrics | None = None,
    more: Callable[[Surroundings], Endpoints] | None = None,
) -> FastAPI:
    """The ASGI application in front of a backend. `metrics` is what /metrics shows; share it with the `Pipeline`.

    `more` makes endpoints that this application has beside OpenAI's.
    """
    settings = settings or HttpSettings()
    watch = Watch(slow_client_timeout=settings.slow_client_timeout, header_timeout=settings.header_timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await watch.close()

    # FastAPI's own documentation pages fetch their scripts from elsewhere; ours work without a network.
    app = FastAPI(title="Dynamo", version=__version__, lifespan=lifespan, openapi_url=None)
    around = Surroundings(
        settings, metrics or Metrics(), watch, ApiKeys(settings.api_keys), AccessLog(enabled=settings.access_log)
    )
    app.state.watch = watch
    endpoints = _endpoints(backend, around) + (more(around) if more is not None else [])
    for methods, endpoint in endpoints:
        app.add_route(endpoint.path, endpoint, methods=methods, include_in_schema=False)  # type: ignore[arg-type]
    for methods, endpoint in endpoints:  # behind the others: takes the methods that those of the path do not
        other = WrongMethod(endpoint.path, around, methods)
        app.add_route(endpoint.path, other, include_in_schema=False)  # type: ignore[arg-type]
    app.router.default = NoPath("other", around, open_to_all=True)
    app.openapi = openapi.document  # type: ignore[method-assign]
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _endpoints(backend: Backend, around: Surroundings) -> Endpoints:
    """Hot paths first: paths are tried in this order."""

    async def models(_: Exchange) -> tuple[int, bytes]:
        return 200, msgspec.json.encode(await backend.models())

    async def model(exchange: Exchange) -> tuple[int, bytes]:
        wanted = exchange.scope["path_params"]["model"]
        served = await backend.models()
        for one in served.data:
            if one.id == wanted:
                return 200, msgspec.json.encode(one)
        names = ", ".join(m.id for m in served.data)
        raise RequestRejected(
            f"The model {wanted[:200]!r} is not served here; served are {names}.", param="model", code="model_not_found"
        )

    async def health(_: Exchange) -> tuple[int, bytes]:
        try:
            await backend.check_ready()
        except EngineError as error:
            return 503, msgspec.json.encode(Health("unavailable", str(error)))
        return 200, msgspec.json.encode(Health("ok"))

    async def live(_: Exchange) -> tuple[int, bytes]:
        return 200, msgspec.json.encode(Health("ok"))

    async def version(_: Exchange) -> tuple[int, bytes]:
        return 200, msgspec.json.encode(Version(__version__))

    async def metrics(_: Exchange) -> tuple[int, bytes]:
        return 200, around.metrics.render()

    async def document(_: Exchange) -> tuple[int, bytes]:
        return 200, openapi.encoded()

    async def docs(_: Exchange) -> tuple[int, bytes]:
        return 200, docs_page.encoded()

    post, get = ["POST"], ["GET"]
    return [
        (post, Generation("/v1/chat/completions", around, ChatRequest, backend.chat)),
        (post, Generation("/v1/completions", around, CompletionRequest, backend.completion)),
        (get, Read("/v1/models", around, models)),
        (get, Read("/v1/models/{model:path}", around, model)),
        *((post, Call(p, around, TokenizeRequest, backend.tokenize)) for p in ("/v1/tokenize", "/tokenize")),
        *((post, Call(p, around, DetokenizeRequest, backend.detokenize)) for p in ("/v1/detokenize", "/detokenize")),
        (get, Read("/health", around, health, open_to_all=True)),
        (get, Read("/live", around, live, open_to_all=True)),
        (get, Read("/version", around, version, open_to_all=True)),
        (get, Read("/metrics", around, metrics, open_to_all=True, content_type=PLAIN)),
        (get, Read("/openapi.json", around, document, open_to_all=True)),
        (get, Read("/docs", around, docs, open_to_all=True, content_type=HTML)),
    ]
