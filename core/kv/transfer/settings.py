"""How an endpoint is set up, and what it reports of a transfer."""

from __future__ import annotations

import msgspec

from core.kv.transfer.choice import Transport


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an endpoint is set up."""

    transport: Transport = Transport.AUTO
    """`kv-transfer`: what moves KV."""
    checksum: bool = False
    """`kv-checksum`: blocks are exported with checksums, and readers verify them."""
    host: str = "127.0.0.1"
    """Address to listen on; peers on other hosts must be able to reach it."""
    advertise: str = ""
    """Address that peers are told, when it is not `host` (0.0.0.0, a container)."""
    port: int = 0
    """0 takes a free one."""
    parallel: int = 4
    """Transfers through threads (TCP, within the process) at a time; more wait, within their deadlines."""
    ucx: str = ""
    """NIXL's UCX settings, such as "TLS=tcp"; empty for UCX's own choice."""
    patience: float = 5.0
    """Seconds for which `close` waits for transfers that were given up."""


class TransferReport(msgspec.Struct, frozen=True):
    """How a transfer went."""

    transport: Transport
    reason: str
    """Why that transport."""
    bytes: int
    seconds: float
