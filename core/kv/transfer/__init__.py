"""Moving KV blocks between workers: in one process, over NIXL, or over plain sockets (see docs/kv-transfer.md)."""

from core.kv.transfer.canonical import CanonicalKv, KvShard, export_blocks, import_blocks, push_blocks
from core.kv.transfer.choice import Choice, Transport
from core.kv.transfer.endpoint import KvEndpoint
from core.kv.transfer.errors import ChecksumMismatch, PeerLost, TransferError, TransferLate, TransferRefused
from core.kv.transfer.grants import Access
from core.kv.transfer.pool import KvPool, KvRegion, MemoryKind
from core.kv.transfer.settings import TransferReport, TransferSettings

__all__ = [
    "Access",
    "CanonicalKv",
    "ChecksumMismatch",
    "Choice",
    "KvEndpoint",
    "KvPool",
    "KvRegion",
    "KvShard",
    "MemoryKind",
    "PeerLost",
    "TransferError",
    "TransferLate",
    "TransferRefused",
    "TransferReport",
    "TransferSettings",
    "Transport",
    "export_blocks",
    "import_blocks",
    "push_blocks",
]
