"""A worker's side of the KV event stream: normalizes, numbers, and answers routers that missed something."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from msgspec.structs import replace

from core.kv.events import BlocksCleared, BlocksPlaced, KvReplayRequest, KvSnapshotPart, KvUpdate, KvUpdateBatch
from core.kv.normalizer import KvNormalizer
from core.kv.sequencer import Sequencer
from core.messages import KvEventBatch

log = logging.getLogger(__name__)

REORDER_WINDOW = 64
"""Engine batches held back for a missing earlier one before it is given up for lost."""
REPLAY_BATCHES = 4096
"""Published batches kept a rank for routers that missed them."""
MESSAGE_BYTES = 512 * 1024
"""Roughly the most that one message is long when encoded; NATS takes 1 MiB."""
_RUN_BYTES, _BLOCK_BYTES = 64, 9
"""What an update, and each of its blocks, takes in a message at most."""


class _Rank:
    """One data-parallel rank: the engine's numbering on one side, ours on the other."""

    def __init__(self, block_size: int) -> None:
        self.normalizer = KvNormalizer(block_size)
        self.engine: Sequencer[KvEventBatch] = Sequencer()
        self.lost = 0
        self.sequence = 0
        self.published: deque[KvUpdateBatch] = deque(maxlen=REPLAY_BATCHES)


class KvEventSource:
    """One worker's stream. Its epoch is the moment it was made, so that a restarted worker begins a new one."""

    def __init__(
        self, worker: str, block_size: int, *, epoch: int | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives Unix seconds. Raises `ValueError` for a block size below 1."""
        if block_size < 1:
            raise ValueError(f"block size is {block_size}; expected at least 1")
        self.worker = worker
        self.block_size = block_size
        self.epoch = time.time_ns() if epoch is None else epoch
        self._clock = clock
        self._ranks: dict[int, _Rank] = {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that have been heard of."""
        return tuple(self._ranks)

    @property
    def lost_batches(self) -> int:
        """Engine batches that never came. Their removals are unknown, so some announced blocks may be gone."""
        return sum(rank.lost for rank in self._ranks.values())

    def normalizer(self, rank: int = 0) -> KvNormalizer:
        """The mirror of a rank's cache, for its counters and its size."""
        return self._rank(rank).normalizer

    def prefix(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks, from its first on, the rank that holds most of them can reuse."""
        return max((rank.normalizer.prefix(blocks) for rank in self._ranks.values()), default=0)

    def ingest(self, batch: KvEventBatch) -> list[KvUpdateBatch]:
        """What to publish for an engine's batch: usually one batch, none when nothing changed or one is missing.

        It is several when one would be too long for a message.

        Engine batches are numbered per rank. Repeated ones are left out; one that comes early waits for up to
        `REORDER_WINDOW` others.
        """
        rank = self._rank(batch.data_parallel_rank)
        ready = rank.engine.offer(batch.sequence, batch)
        if len(rank.engine) > REORDER_WINDOW:
            expected = rank.engine.next
            ready = rank.engine.skip_gap()
            rank.lost += ready[0].sequence - expected
            log.warning(
                "Worker %s, rank %d: KV event batches %d to %d of the engine never came; "
                "blocks evicted in them stay announced until the engine clears its cache.",
                self.worker, batch.data_parallel_rank, expected, ready[0].sequence - 1,
            )  # fmt: skip
        published = []
        for item in ready:
            cut = _cut(rank.normalizer.apply(item.events), MESSAGE_BYTES)
            published += [self._publish(rank, batch.data_parallel_rank, updates) for updates in cut]
        return published

    def heartbeat(self, rank: int = 0) -> KvUpdateBatch:
        """An empty batch: published on a quiet stream now and then, it shows routers whether they missed the last."""
        return self._publish(self._rank(rank), rank, [])

    def answer(self, request: KvReplayRequest) -> list[KvUpdateBatch] | list[KvSnapshotPart]:
        """The batches that a router misses; a snapshot when they are gone, or when the router is of another epoch."""
        rank = self._rank(request.rank)
        kept = rank.published
        if request.epoch != self.epoch or not kept or request.sequence < kept[0].sequence:
            return self.snapshot(request.rank)
        return [batch for batch in kept if batch.sequence >= request.sequence]

    def snapshot(self, rank: int = 0) -> list[KvSnapshotPart]:
        """Everything announced, cut into parts that fit messages."""
        state = self._rank(rank)
        parts = list(_cut(state.normalizer.snapshot(), MESSAGE_BYTES)) or [[]]
        return [
            KvSnapshotPart(
                worker=self.worker,
                rank=rank,
                epoch=self.epoch,
                sequence=state.sequence,
                part=number,
                parts=len(parts),
                updates=part,
            )
            for number, part in enumerate(parts)
        ]

    def _rank(self, rank: int) -> _Rank:
        state = self._ranks.get(rank)
        if state is None:
            state = self._ranks[rank] = _Rank(self.block_size)
        return state

    def _publish(self, state: _Rank, rank: int, updates: list[KvUpdate]) -> KvUpdateBatch:
        batch = KvUpdateBatch(
            worker=self.worker,
            rank=rank,
            epoch=self.epoch,
            sequence=state.sequence,
            updates=updates,
            published=self._clock(),
        )
        state.sequence += 1
        state.published.append(batch)
        return batch

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a mirror contradicts itself or the kept batches are not numbered in a row."""
        for state in self._ranks.values():
            state.normalizer.check_integrity()
            state.engine.check_integrity()
            numbers = [batch.sequence for batch in state.published]
            assert numbers == list(range(state.sequence - len(numbers), state.sequence)), f"published are {numbers}"


U = TypeVar("U", bound=KvUpdate)


def _cut(updates: Sequence[U], limit: int) -> Iterator[list[U]]:
    """Groups updates, in order, into lists of about `limit` bytes at most; what is longer is cut in two."""
    group: list[U] = []
    room = limit
    for update in updates:
        rest: U | None = update
        while rest is not None:
            fit = (room - _RUN_BYTES) // _BLOCK_BYTES
            if fit < 1 and group:
                yield group
                group, room = [], limit
                continue
            head, rest = _split(rest, max(fit, 1))
            group.append(head)
            room -= _RUN_BYTES + _BLOCK_BYTES * (0 if isinstance(head, BlocksCleared) else len(head.hashes))
    if group:
        yield group


def _split(update: U, blocks: int) -> tuple[U, U | None]:
    """The part of an update that names its first blocks, and the rest, if there is one."""
    if isinstance(update, BlocksCleared) or len(update.hashes) <= blocks:
        return update, None
    head, rest = update.hashes[:blocks], update.hashes[blocks:]
    if isinstance(update, BlocksPlaced):
        return replace(update, hashes=head), replace(update, hashes=rest, parent=head[-1])
    return replace(update, hashes=head), replace(update, hashes=rest)
