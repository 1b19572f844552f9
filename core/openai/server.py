"""Serves an application over HTTP, in the event loop it is started in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI

from core.messages import ConfigError, Unavailable
from core.openai.connection import HttpConnection
from core.openai.listening import check_tls, listen
from core.openai.settings import HttpSettings
from core.openai.watch import Watch

_STOP_WITHIN = 2.0
"""Seconds that running requests have to say their last word at an immediate stop."""


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever runs the process, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class HttpServer:
    """Start once; then `drain` or `stop`, or wait for `closed`. As a context manager it stops at the end."""

    def __init__(self, app: FastAPI, settings: HttpSettings | None = None) -> None:
        self._settings = settings or HttpSettings()
        self._app = app
        self._watch: Watch = app.state.watch
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None
        self._port = self._settings.port

    @property
    def port(self) -> int:
        """The port that is listened on; what was configured before the start."""
        return self._port

    @property
    def url(self) -> str:
        """Where clients on this machine find the server."""
        scheme = "https" if self._settings.ssl_certfile else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._settings.host, self._settings.host)
        return f"{scheme}://{host}:{self._port}"

    @property
    def connections(self) -> Sequence[HttpConnection]:
        """Open connections."""
        return [] if self._server is None else list(self._server.server_state.connections)  # type: ignore[arg-type]

    async def start(self) -> None:
        """Listens; returns when requests can come. Raises `ConfigError` when the port is taken or TLS files are bad."""
        settings = self._settings
        check_tls(settings)
        listener = listen(settings)
        self._port = listener.getsockname()[1]
        connection = type("HttpConnection", (HttpConnection,), {"max_header_size": settings.max_header_size})
        config = uvicorn.Config(
            self._app,
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,  # that it starts and ends is said by whoever runs it
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type] # a float works as well
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            backlog=2048,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not self._server.listening.is_set():
            listening.cancel()
            await self._task
            raise ConfigError("The HTTP server ended before it listened.")
        self._watch.connections = self._server.server_state.connections  # type: ignore[assignment]
        self._watch.start()

    async def closed(self) -> None:
        """Returns when the server has ended. Raises what ended it, if that was a defect."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def drain(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109  the rest is stopped, not cancelled
        """Takes no new connections, lets running requests finish, then stops. False when `timeout` seconds were not
        enough and requests were ended with an error."""
        if self._server is None or self._task is None:
            return True
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._task}, timeout=timeout)
        await self.stop()
        return bool(done)

    async def stop(self) -> None:
        """Ends everything now: running requests get one error. Idempotent, safe without a start."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = self._server.force_exit = True
        self._watch.interrupt_all(Unavailable("The server is stopping; send the request again, to another server."))
        handlers = set(self._server.server_state.tasks)
        if handlers:
            await asyncio.wait(handlers, timeout=_STOP_WITHIN)
        for connection in self.connections:
            connection.cut()
        await asyncio.wait({self._task})
        await self._watch.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
