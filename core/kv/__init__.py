"""What is known of cached KV: block hashes, and the normalized events that say which worker holds which block."""

from core.kv.events import (
    BlocksCleared,
    BlocksPlaced,
    BlocksRemoved,
    KvReplayRequest,
    KvSnapshotPart,
    KvUpdate,
    KvUpdateBatch,
)
from core.kv.follower import BlockSink, KvFollower
from core.kv.hashing import hash_blocks, prompt_hashes, root_hash
from core.kv.normalizer import KvNormalizer
from core.kv.source import KvEventSource
from core.kv.target import Target

__all__ = [
    "BlockSink",
    "BlocksCleared",
    "BlocksPlaced",
    "BlocksRemoved",
    "KvEventSource",
    "KvFollower",
    "KvNormalizer",
    "KvReplayRequest",
    "KvSnapshotPart",
    "KvUpdate",
    "KvUpdateBatch",
    "Target",
    "hash_blocks",
    "prompt_hashes",
    "root_hash",
]
