"""The normalized KV event stream: what a worker tells routers about its prefix cache.

Engines differ in hash algorithm, width and sign, store one hash several times, and evict in any order. None of that
leaves the worker: a `KvNormalizer` turns engine events into this form, in which

- a block is named by the core's chained hash (`core.kv.hashing`);
- a block is announced once, however often the engine stored it;
- the announced blocks are *closed*: a block is announced only while every block before it is. A block whose
  predecessor was evicted cannot be reused, so it is withdrawn, and announced again when the predecessor returns;
- the medium of a block is the slowest one on the way from the start of the sequence to it. So the blocks up to any
  medium are closed too, and a prefix is served from the device up to some block, then from host memory, and so on.

Because of the closure, the workers that hold a prefix only become fewer along it, and an index can search a chain by
bisection (`core.routing.index`).

Batches are numbered from 0 without gaps per (worker, rank, epoch). A worker that restarts begins a new, larger epoch,
and everything said in an older one is void.
"""

from __future__ import annotations

import msgspec

from core.kv.target import Target
from core.messages import Medium


class BlocksPlaced(msgspec.Struct, frozen=True, tag="placed", omit_defaults=True):
    """A run of blocks is reusable from `medium`: announced now, or moved there from another medium."""

    hashes: list[int]
    """Chained hashes in chain order; each block follows the one before it."""
    parent: int | None = None
    """Hash of the announced block before the first one; None at the start of a sequence."""
    medium: Medium = Medium.DEVICE


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    """Blocks are no longer reusable from any medium. Whatever followed them is named too."""

    hashes: list[int]


class BlocksCleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Nothing is reusable any more."""


KvUpdate = BlocksPlaced | BlocksRemoved | BlocksCleared


class KvUpdateBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="batch"):
    """Updates that belong together; applied in order, whole."""

    worker: str
    rank: int = 0
    epoch: int
    """Nanoseconds since 1970 at the start of the worker's stream: a later start is a larger number."""
    sequence: int
    updates: list[KvUpdate]
    published: float = 0.0
    """Unix time in seconds at which the worker made the batch; what event lag is measured from."""

    @property
    def target(self) -> Target:
        """Whose cache this is about."""
        return Target(self.worker, self.rank)


class KvSnapshotPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="snapshot"):
    """A piece of everything that is announced. Cut so that each fits a message of the transport."""

    worker: str
    rank: int = 0
    epoch: int
    sequence: int
    """Sequence number of the next batch: the snapshot has everything before it."""
    part: int
    parts: int
    """Pieces of this snapshot, at least 1."""
    updates: list[BlocksPlaced]
    """Parents first, over all parts in order."""

    @property
    def target(self) -> Target:
        """Whose cache this is about."""
        return Target(self.worker, self.rank)


class KvReplayRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A router that missed batches asks for them. Answered with batches, or with a snapshot when they are gone."""

    worker: str
    rank: int = 0
    epoch: int | None = None
    """The epoch the router knows; None, or one that is over, is answered with a snapshot."""
    sequence: int = 0
    """First batch that is missing."""
