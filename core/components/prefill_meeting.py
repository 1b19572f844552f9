"""What the Workers and PrefillWorkers of one process share: the prefill queue, and the key of their KV tickets."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from core.components.prefill_keys import PrefillKeys
from core.kv.ticket import TicketKey
from core.messages import EngineInfo
from core.prefill.local_queue import LocalQueue
from core.prefill.queue import PrefillQueue, QueueUnavailable
from core.runtime import Runtime

if TYPE_CHECKING:
    from nats.aio.client import Client

logger = logging.getLogger("dynamo.prefill")

SERVER = "NATS_SERVER"
DEFAULT_SERVER = "nats://localhost:4222"
CONNECT_TIMEOUT = 5
"""Seconds that the server has to answer at the start."""
RECONNECT_WAIT = 1
"""Seconds between attempts; a server that comes back is found, for ever."""

_known: WeakKeyDictionary[Runtime, dict[str, Meeting]] = WeakKeyDictionary()


class Meeting:
    """One queue and one key for a model in a runtime. Use `join`; whoever joined calls `leave`, once."""

    def __init__(self, name: str, queue: PrefillQueue, key: TicketKey, client: Client | None) -> None:
        """`client`: the queue's connection, to be closed after it."""
        self.queue = queue
        self.key = key
        self._name = name
        self._client = client
        self._members = 0

    @classmethod
    async def join(cls, runtime: Runtime, namespace: str, info: EngineInfo, config: PrefillKeys) -> Meeting:
        """The meeting of all workers in `namespace` that can use each other's KV, made by the first who joins.

        Raises `QueueUnavailable` when the queue is on a server and that cannot be reached.
        """
        meetings = _known.setdefault(runtime, {})
        # Not the name that clients know: the two sides may be configured for different ones.
        name = f"{namespace}/{info.kv_fingerprint.get('model', '')}"
        if name not in meetings:
            made = await _make(name, config)
            if name in meetings:  # somebody was faster
                await made._close()
            else:
                meetings[name] = made
        meeting = meetings[name]
        meeting._members += 1
        return meeting

    async def leave(self, runtime: Runtime) -> None:
        """The last one who leaves closes the queue."""
        self._members -= 1
        if not self._members:
            del _known[runtime][self._name]
            await self._close()

    async def _close(self) -> None:
        await self.queue.close()
        if self._client is not None:
            await self._client.close()


async def _make(name: str, config: PrefillKeys) -> Meeting:
    settings, key = config.disagg().queue, TicketKey(config.kv_secret)
    if config.prefill_queue == "local":
        return Meeting(name, LocalQueue(settings), key, None)
    from core.prefill.nats_queue import NatsQueue

    client = await _connect(os.environ.get(SERVER) or DEFAULT_SERVER)
    queue = NatsQueue(client, name, settings)
    try:
        await queue.open()
    except BaseException:
        await client.close()
        raise
    return Meeting(name, queue, key, client)


_LOGIN = {
    "user": "NATS_AUTH_USERNAME",
    "password": "NATS_AUTH_PASSWORD",
    "token": "NATS_AUTH_TOKEN",
    "nkeys_seed_str": "NATS_AUTH_NKEY",
    "user_credentials": "NATS_AUTH_CREDENTIALS_FILE",
}
"""How to log in at the server, in environment variables."""


def _login() -> dict[str, Any]:
    return {argument: value for argument, variable in _LOGIN.items() if (value := os.environ.get(variable))}


async def _connect(server: str) -> Client:
    import nats
    import nats.errors

    heard: list[Exception] = []

    async def on_error(error: Exception) -> None:
        heard[:] = [error]
        logger.warning("Prefill queue: %s: %s", server, error)

    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            return await nats.connect(
                server,
                name="dynamo prefill queue",
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_WAIT,
                error_cb=on_error,
                **_login(),
            )
    except (nats.errors.Error, OSError, ValueError, TimeoutError) as error:
        why = heard[0] if heard else error
        raise QueueUnavailable(
            f"No NATS server can be reached at {server} ({why or type(why).__name__}), and prefill-queue is nats: "
            f"start one with JetStream ('nats-server -js'), name another in {SERVER}, or set prefill-queue to local."
        ) from error
