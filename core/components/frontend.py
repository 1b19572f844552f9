"""The frontend: the deployment's HTTP server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from core.components.processor import Processor
from core.graph import Preflight, Service, SettingError, depends, on_drain, on_start, on_stop, service
from core.graph.config import Secret
from core.openai.listening import check
from core.openai.settings import HttpSettings
from core.runtime import Address, Client

if TYPE_CHECKING:
    from core.openai.server import HttpServer


class FrontendConfig(HttpSettings, frozen=True, kw_only=True):
    """Keys of the Frontend."""

    served_model_name: str = ""
    """Name under which clients ask for the model, by default the hub id or the folder's name."""
    endpoint: str | None = None
    """Endpoint that answers chat requests, as namespace.Service.endpoint, by default the linked Processor's."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    api_keys: Annotated[tuple[str, ...], Secret()] = ()
    """Accepted bearer tokens; empty lets everybody in. Health, metrics and documentation stay open."""


@service()
class Frontend(Service):
    """Serves the OpenAI-compatible API over HTTP."""

    Config = FrontendConfig
    config: FrontendConfig
    processor = depends(Processor)

    def __init__(self) -> None:
        self._server: HttpServer | None = None

    @classmethod
    def preflight(cls, config: FrontendConfig, look: Preflight) -> None:
        """Raises `ConfigError` when address or TLS files cannot be used, or the endpoint is none of this graph's."""
        settings = look.settings.services["Frontend"]
        if settings.args.workers > 1:
            setting = settings.setting("ServiceArgs.workers")
            raise SettingError(
                f"{setting.origin}: {setting} is {setting.value}, and one process listens on a port once; set it to 1."
            )
        if config.endpoint is not None:
            _check_endpoint(config.endpoint, look)
        check(config)

    @on_start
    async def listen(self) -> None:
        """Serve HTTP, and tell the operator how to use it."""
        from core.components.backend import ProcessorBackend
        from core.components.prefill_http import PrefillDoor
        from core.components.router_http import routing_endpoints
        from core.openai.app import create_app
        from core.openai.server import HttpServer

        assert self.processor is not None
        chat: Client | None = None
        if self.config.endpoint is not None:
            chat = self.context.runtime.client(Address.parse(self.config.endpoint))
        backend = ProcessorBackend(self.processor, chat)
        prefill = PrefillDoor(self.context)
        app = create_app(
            backend,
            self.config,
            metrics=self.context.metrics,
            more=lambda around: [*routing_endpoints(backend, around), *prefill.endpoints(around)],
        )
        self._server = HttpServer(app, self.config)
        await self._server.start()
        models = await backend.models()
        self.context.announce(_how_to_call(self._server.url, models.data[0].id, keys=bool(self.config.api_keys)))

    @on_drain
    async def finish(self) -> None:
        """Take no new connections and finish the running requests."""
        if self._server is not None:
            await self._server.drain()

    @on_stop
    async def end(self) -> None:
        """Close the port."""
        if self._server is not None:
            await self._server.stop()


def _check_endpoint(text: str, look: Preflight) -> None:
    setting = look.settings.services["Frontend"].setting("endpoint")
    known = [
        str(Address(look.settings.namespace, name, endpoint.name))
        for name, node in look.plan.nodes.items()
        for endpoint in node.spec.endpoints.values()
        if name != "Frontend" and endpoint.name.endswith("chat/completions")
    ]
    if text not in known:
        raise SettingError(
            f"{setting.origin}: no service of {look.plan.name} answers chat at '{text}'; write {' or '.join(known)}."
        )


def _how_to_call(url: str, model: str, *, keys: bool) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello! Who are you?"}], "stream": True}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keys else ""
    return (
        f"Serving {model} at {url}/v1\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{json.dumps(body)}'\n\n"
        f"  {url}/docs describes the API, {url}/metrics has the figures."
    )
