"""A prefill engine in a process of its own: `python -m tests.engines.torch.kv_prefiller CONFIG`.

CONFIG is an `EngineConfig` as JSON. Each line of input is an `EngineRequest`; each line of output the ticket for its
KV, not sealed, as base64 of msgpack. The first line says that it is ready.
"""

from __future__ import annotations

import asyncio
import base64
import sys

import msgspec

from core.engine import EngineHost, EngineRegistry, Source
from core.kv.ticket import encode_ticket
from core.messages import EngineConfig, EngineRequest, Role
from engines.torch import TorchEngine


async def main() -> None:
    """Serves until the input ends."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    adapter = EngineRegistry([]).add(TorchEngine, Source("torch", "tests"))
    async with EngineHost(adapter, config, Role.PREFILL) as host:
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            request = msgspec.json.decode(line, type=EngineRequest)
            result = await host.prefill(request)
            ticket = await host.export_kv(result.session)
            complete = msgspec.structs.replace(ticket, first=result.first)
            say(base64.b64encode(encode_ticket(complete)).decode())


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
