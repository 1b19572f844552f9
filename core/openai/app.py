"""The application: which path is answered by what."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from core import __version__
from core.messages import EngineError, RequestRejected
from core.observe import AccessLog, Metrics
from core.openai import openapi
from core.openai.auth import ApiKeys
from core.openai.backend import Backend
from core.openai.endpoints import PLAIN, Call, Endpoint, Generation, Read, Surroundings
from core.openai.errors import describe, error_json
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

    app = FastAPI(
        title="Dynamo",
        version=__version__,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    around = Surroundings(
        settings, metrics or Metrics(), watch, ApiKeys(settings.api_keys), AccessLog(enabled=settings.access_log)
    )
    app.state.watch = watch
    for methods, endpoint in _endpoints(backend, around) + (more(around) if more is not None else []):
        app.add_route(endpoint.path, endpoint, methods=methods, include_in_schema=False)  # type: ignore[arg-type]
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
    ]


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == 404:
        rejected = RequestRejected(f"There is no path '{request.url.path[:200]}'; /docs lists them.", code="not_found")
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        rejected = RequestRejected(
            f"'{request.url.path[:200]}' does not take {request.method[:20]}; use {allowed}.", code="method_not_allowed"
        )
    else:
        rejected = RequestRejected(str(error.detail))
    _, described = describe(rejected)
    return Response(error_json(described), status, headers=error.headers, media_type="application/json")
