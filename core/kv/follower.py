"""A router's side of the KV event stream: keeps the order, notices gaps, and gets what is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from core.kv.events import KvReplayRequest, KvSnapshotPart, KvUpdate, KvUpdateBatch
from core.kv.sequencer import Sequencer
from core.kv.target import Target

log = logging.getLogger(__name__)

HELD_BATCHES = 1024
"""Batches held for a missing one; past it they are dropped and a snapshot is asked for instead."""
RETRY_SECONDS = 2.0
"""An unanswered request is made again after this long."""

_decode = msgspec.msgpack.Decoder(KvUpdateBatch | KvSnapshotPart).decode


class BlockSink(Protocol):
    """What follows the stream: the prefix index."""

    def apply(self, target: Target, updates: Sequence[KvUpdate]) -> None:
        """Carries out updates, in order."""

    def forget(self, target: Target) -> None:
        """Drops everything known of the target."""


class FollowerCounters(msgspec.Struct):
    """What happened to the streams, since the start."""

    batches: int = 0
    """Applied."""
    snapshots: int = 0
    """Applied, whole."""
    duplicates: int = 0
    stale: int = 0
    """Of an epoch that is over."""
    unknown: int = 0
    """Of targets that are not followed."""
    undecodable: int = 0
    """Truncated or foreign bytes. What they should have said shows up as a gap."""
    gaps: int = 0
    """Times something was missing."""


class _Stream:
    """What is known of one target's stream. `epoch` is None until the first batch or snapshot."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.synced = False
        """Whether the sink has everything before `order.next`."""
        self.order: Sequencer[KvUpdateBatch] = Sequencer()
        self.asked_at: float | None = None
        self.parts: dict[int, KvSnapshotPart] = {}
        self.lag = 0.0


class KvFollower:
    """Follows the streams of the live targets into a sink.

    The owner calls `follow` and `unfollow` as workers come and go, hands over what arrives in any order, and calls
    `tick` about once a second. `ask` is called with what must be sent to a worker; the answer, batches or snapshot
    parts, is handed over like everything else.
    """

    def __init__(
        self,
        sink: BlockSink,
        ask: Callable[[KvReplayRequest], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.counters = FollowerCounters()
        self._sink = sink
        self._ask = ask
        self._clock = clock
        self._wall_clock = wall_clock
        self._streams: dict[Target, _Stream] = {}

    def follow(self, target: Target) -> None:
        """Begins with a target and asks for its snapshot. Idempotent."""
        if target not in self._streams:
            stream = self._streams[target] = _Stream()
            self._request(target, stream)

    def unfollow(self, target: Target) -> None:
        """Forgets a target that is lost, at once. Idempotent."""
        if self._streams.pop(target, None) is not None:
            self._sink.forget(target)

    def synced(self, target: Target) -> bool:
        """Whether nothing is known to be missing of the target's cache."""
        stream = self._streams.get(target)
        return stream is not None and stream.synced and not len(stream.order)

    def lag(self, target: Target) -> float:
        """Seconds between the publishing and the applying of the target's last batch, by two wall clocks."""
        stream = self._streams.get(target)
        return stream.lag if stream is not None else 0.0

    def offer_encoded(self, data: bytes) -> None:
        """`offer` of a msgpack-encoded message. Bytes that are no message are counted and left out."""
        try:
            message = _decode(data)
        except msgspec.DecodeError as error:
            self.counters.undecodable += 1
            log.warning("A KV event of %d bytes cannot be read and is left out: %s", len(data), error)
            return
        self.offer(message)

    def offer(self, message: KvUpdateBatch | KvSnapshotPart) -> None:
        """Takes what arrived, in any order and any number of times."""
        target = message.target
        stream = self._streams.get(target)
        if stream is None:
            self.counters.unknown += 1
            return
        if stream.epoch is not None and message.epoch < stream.epoch:
            self.counters.stale += 1
            return
        if stream.epoch is None or message.epoch > stream.epoch:
            self._begin_epoch(target, stream, message.epoch)
        if isinstance(message, KvUpdateBatch):
            self._offer_batch(target, stream, message)
        else:
            self._offer_part(target, stream, message)

    def tick(self) -> None:
        """Asks again for what has not come."""
        now = self._clock()
        for target, stream in self._streams.items():
            if stream.asked_at is not None and now - stream.asked_at >= RETRY_SECONDS:
                self._request(target, stream)

    def _begin_epoch(self, target: Target, stream: _Stream, epoch: int) -> None:
        if stream.epoch is not None:
            self._sink.forget(target)
        # At its number 0 a stream has said nothing yet, so from there on nothing is missing.
        stream.epoch, stream.synced, stream.order, stream.parts = epoch, True, Sequencer(), {}

    def _offer_batch(self, target: Target, stream: _Stream, batch: KvUpdateBatch) -> None:
        duplicates = stream.order.duplicates
        ready = stream.order.offer(batch.sequence, batch)
        self.counters.duplicates += stream.order.duplicates - duplicates
        self._apply(target, stream, ready)
        if not len(stream.order):
            stream.asked_at = None if stream.synced else stream.asked_at
            return
        if len(stream.order) > HELD_BATCHES:
            stream.order.drop_held()
            stream.synced = False
            self._request(target, stream)
        elif stream.asked_at is None:
            self.counters.gaps += 1
            self._request(target, stream)

    def _offer_part(self, target: Target, stream: _Stream, part: KvSnapshotPart) -> None:
        if stream.synced and (
            part.sequence < stream.order.next or (part.sequence == stream.order.next and part.sequence)
        ):
            # An answer that batches have overtaken.
            self.counters.duplicates += 1
            return
        if any(held.sequence != part.sequence or held.parts != part.parts for held in stream.parts.values()):
            stream.parts.clear()
        stream.parts[part.part] = part
        if len(stream.parts) < part.parts:
            return
        self._sink.forget(target)
        for number in range(part.parts):
            self._sink.apply(target, stream.parts[number].updates)
        stream.parts = {}
        stream.synced, stream.asked_at = True, None
        self.counters.snapshots += 1
        self._apply(target, stream, stream.order.skip_to(part.sequence))
        if len(stream.order):
            self.counters.gaps += 1
            self._request(target, stream)

    def _apply(self, target: Target, stream: _Stream, ready: Sequence[KvUpdateBatch]) -> None:
        for batch in ready:
            self._sink.apply(target, batch.updates)
            self.counters.batches += 1
            if batch.published:
                stream.lag = max(0.0, self._wall_clock() - batch.published)

    def _request(self, target: Target, stream: _Stream) -> None:
        stream.asked_at = self._clock()
        epoch = stream.epoch if stream.synced else None
        self._ask(KvReplayRequest(worker=target.worker, rank=target.rank, epoch=epoch, sequence=stream.order.next))

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a stream misses something and nobody was asked for it."""
        for target, stream in self._streams.items():
            stream.order.check_integrity()
            assert (stream.synced and not len(stream.order)) or stream.asked_at is not None, f"{target} is stuck"
