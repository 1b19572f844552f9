"""One list of blocks on its way between a peer and local memory, by each of the three transports.

A move copies the same pieces of blocks on both sides. Its local side is the endpoint's own pool when the two layouts
agree, and a scratch pool in the peer's layout when they do not.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from core.kv.lease import Deadline, lease_clock
from core.kv.transfer import wire
from core.kv.transfer.choice import Transport
from core.kv.transfer.errors import PeerLost, TransferError, TransferLate, TransferRefused
from core.kv.transfer.execute import copy_blocks
from core.kv.transfer.grants import Access, Proof, StatusEntry
from core.kv.transfer.host import peek
from core.kv.transfer.inflight import Hold
from core.kv.transfer.nixl_agent import NixlAgent, Peer
from core.kv.transfer.offer import TransferOffer
from core.kv.transfer.pool import KvPool, Pattern, PoolGeometry
from core.kv.transfer.side import LocalSide
from core.kv.transfer.tcp_client import Cancel, TcpClient

in_process: dict[str, LocalSide] = {}
"""The endpoints of this process, by the life they are."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A peer as one request sees it."""

    offer: TransferOffer
    geometry: PoolGeometry
    transport: Transport
    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks to copy. `pattern` None: whole blocks."""

    session: str
    remote_blocks: Sequence[int]
    local_blocks: Sequence[int]
    side: LocalSide
    deadline: Deadline
    pattern: Pattern | None = None


class Movers:
    """Carries moves out, off the event loop and within their deadlines."""

    def __init__(self, executor: ThreadPoolExecutor, threads: int, client: TcpClient, nixl: NixlAgent | None) -> None:
        self._executor = executor
        self._threads = threads
        self._client = client
        self._nixl = nixl
        self._running: set[Cancel] = set()

    def stop(self) -> None:
        """Tell all blocking work to end now: the endpoint closes."""
        for cancel in list(self._running):
            cancel.fire()

    async def read(self, remote: Remote, move: Move) -> None:
        """Fill the local blocks. Raises `TransferError`; the blocks are then not to be used.

        Whatever the outcome, the blocks are claimed in the side's `InFlight` until nothing can touch them any more.
        """
        if remote.transport is Transport.NIXL:
            hold = move.side.inflight.hold(move.local_blocks)
            await self._one_sided(remote, move, "READ", hold.release)
            await self.confirm(remote, move.session, move.remote_blocks, move.deadline)
        elif remote.transport is Transport.TCP:
            await self._read_stream(remote, move)
        else:
            hold = move.side.inflight.hold(move.local_blocks)
            await self.in_thread(lambda _: self._copy(remote, move, Access.READ), move.deadline, hold)

    async def write(self, remote: Remote, move: Move) -> None:
        """Fill the remote blocks. Raises `TransferError`; the remote blocks then hold nothing of use."""
        hold = move.side.inflight.hold(move.local_blocks)
        if remote.transport is Transport.NIXL:
            await self._announced(
                remote,
                move.session,
                move.remote_blocks,
                move.deadline,
                hold,
                lambda over: self._one_sided(remote, move, "WRITE", over),
            )
        else:
            await self.in_thread(lambda cancel: self._write_here(remote, move, cancel), move.deadline, hold)

    async def read_rows(
        self,
        remote: Remote,
        session: str,
        remote_blocks: Sequence[int],
        rows: Any,
        pool: KvPool,
        deadline: Deadline,
        hold: Hold,
    ) -> None:
        """Fetch byte ranges (local address, remote address, bytes) over NIXL, for device memory of another layout."""
        await self._post(remote, lambda agent, peer: agent.make_rows("READ", peer, rows, pool), deadline, hold.release)
        await self.confirm(remote, session, remote_blocks, deadline)

    async def write_rows(
        self,
        remote: Remote,
        session: str,
        remote_blocks: Sequence[int],
        rows: Any,
        pool: KvPool,
        deadline: Deadline,
        hold: Hold,
    ) -> None:
        """As `read_rows`, the other way."""
        await self._announced(
            remote,
            session,
            remote_blocks,
            deadline,
            hold,
            lambda over: self._post(
                remote, lambda agent, peer: agent.make_rows("WRITE", peer, rows, pool), deadline, over
            ),
        )

    async def confirm(self, remote: Remote, session: str, blocks: Sequence[int], deadline: Deadline) -> None:
        """Find out whether the blocks were held until now. Raises `TransferError` when they were not.

        A peer of the same host that has proved itself before is not asked: its board says it, if it can be read.
        """
        if remote.proof is not None and self._client.has_met(remote.offer.incarnation):
            entry = peek(
                remote.offer.where,
                remote.offer.board + remote.proof.entry * ctypes.sizeof(StatusEntry),
                ctypes.sizeof(StatusEntry),
            )
            if entry is not None:
                _require_stamp(session, remote.proof, StatusEntry.from_buffer_copy(entry))
                return
        message = wire.Confirm(session, blocks)
        if await self._client.ask_here(remote.offer, message, deadline):
            return
        await self.in_thread(lambda cancel: self._client.ask(remote.offer, message, deadline, cancel), deadline)

    async def in_thread(
        self,
        work: Callable[[Cancel], Any],
        deadline: Deadline,
        hold: Hold | None = None,
        discard: Callable[[Any], object] | None = None,
    ) -> Any:
        """Run blocking work, and wait for it until the deadline. `hold` is released when the work has ended.

        At the deadline, and when the caller is cancelled, the work is told to stop and not waited for; `discard` gets
        a result that comes after that.
        """
        cancel = Cancel()

        def run() -> Any:
            try:
                return work(cancel)
            finally:
                if hold is not None:
                    hold.release()

        try:
            running = self._executor.submit(run)
        except RuntimeError as error:
            if hold is not None:
                hold.release()
            raise PeerLost("this worker's KV transfer endpoint is closed") from error
        waiting = asyncio.wrap_future(running)
        self._running.add(cancel)
        waiting.add_done_callback(lambda _: self._running.discard(cancel))
        try:
            await asyncio.wait((waiting,), timeout=deadline.remaining())
            if waiting.done():
                result = waiting.result()
                if deadline.passed():
                    raise TransferLate("the KV transfer ended after its deadline")
                return result
            raise TransferLate("the KV transfer did not end before its deadline")
        finally:
            if not waiting.done():
                cancel.fire()
                if running.cancel() and hold is not None:
                    hold.release()
                running.add_done_callback(lambda ended: _drop(ended, discard))
                waiting.add_done_callback(_retrieve)

    async def _read_stream(self, remote: Remote, move: Move) -> None:
        """Read over TCP. The request goes out at once when a thread is free to take what comes."""
        client, offer = self._client, remote.offer
        message = wire.Read(move.session, move.remote_blocks, move.deadline.remaining(), move.pattern)
        pattern = move.pattern or move.side.pool.whole
        begun = [client.start(offer, message) if len(self._running) < self._threads else None]

        def work(cancel: Cancel) -> None:
            started = begun.pop()
            client.read(offer, message, move.side, move.local_blocks, pattern, move.deadline, cancel, started)

        try:
            await self.in_thread(work, move.deadline, move.side.inflight.hold(move.local_blocks))
        finally:
            # Still here: the thread never came to it, and never will.
            for connection in begun:
                if connection is not None:
                    connection.close()

    def _write_here(self, remote: Remote, move: Move, cancel: Cancel) -> None:
        offer, pattern = remote.offer, move.pattern
        if remote.transport is Transport.MEMORY:
            self._copy(remote, move, Access.WRITE)
            return
        message = wire.Write(move.session, move.remote_blocks, move.deadline.remaining(), pattern)
        mine = pattern or move.side.pool.whole
        self._client.write(offer, message, move.side, move.local_blocks, mine, move.deadline, cancel)

    def _copy(self, remote: Remote, move: Move, access: Access) -> None:
        """Copy within the process, under the peer's grant."""
        peer = neighbour(remote.offer)
        hold, _ = peer.admit(move.session, move.remote_blocks, access)
        try:
            mine, theirs = (move.side.pool, move.local_blocks), (peer.pool, move.remote_blocks)
            (source, from_), (target, to) = (theirs, mine) if access is Access.READ else (mine, theirs)
            pattern = move.pattern or (target.whole if target.whole == source.whole else target.by_region)
            copy_blocks(source, target, from_, to, pattern)
            peer.grants.require(move.session, move.remote_blocks, access)
        finally:
            hold.release()

    async def _one_sided(self, remote: Remote, move: Move, operation: str, settled: Callable[[], None]) -> None:
        """Post the move to NIXL: by index where whole regions move, by address otherwise."""

        def make(agent: NixlAgent, peer: Peer) -> Any:
            import numpy as np

            local = move.side.pool
            regions = None if move.pattern is None else _whole_regions(move.pattern, local)
            if local is agent.pool and (move.pattern is None or regions is not None):
                mine = np.asarray(move.local_blocks, np.int32)
                theirs = np.asarray(move.remote_blocks, np.int32)
                return agent.make_blocks(operation, peer, mine, theirs, regions)
            pattern = move.pattern or local.by_region
            rows = _pattern_rows(local, peer.geometry, move.local_blocks, move.remote_blocks, pattern)
            return agent.make_rows(operation, peer, rows, local)

        await self._post(remote, make, move.deadline, settled)

    async def _post(
        self,
        remote: Remote,
        make: Callable[[NixlAgent, Peer], Any],
        deadline: Deadline,
        settled: Callable[[], None],
    ) -> None:
        if self._nixl is None:
            settled()
            raise PeerLost("this endpoint has no NIXL agent")
        answer = self._nixl.post(make, remote.offer, remote.geometry, deadline, settled)
        waiting = asyncio.wrap_future(answer)
        try:
            await asyncio.wait((waiting,), timeout=deadline.remaining())
            if not waiting.done():
                raise TransferLate(f"KV of {remote.offer.worker_id} did not move before the deadline")
            waiting.result()
            if deadline.passed():
                raise TransferLate(f"KV of {remote.offer.worker_id} arrived after the deadline")
        finally:
            if not waiting.done():
                waiting.add_done_callback(_retrieve)

    async def _announced(
        self,
        remote: Remote,
        session: str,
        blocks: Sequence[int],
        deadline: Deadline,
        hold: Hold,
        write: Callable[[Callable[[], None]], Any],
    ) -> None:
        """Write one-sidedly between `Begin` and `End`, so that the target never reuses blocks that are written to.

        When the write is given up, `End` is said in the background once NIXL has let go of it.
        """
        client, offer = self._client, remote.offer
        try:
            connection = await self.in_thread(
                lambda cancel: client.begin(offer, wire.Begin(session, blocks), deadline, cancel),
                deadline,
                discard=lambda late: late.close(),
            )
        except BaseException:
            hold.release()
            raise
        over: Future[None] = Future()

        def settled() -> None:
            hold.release()
            over.set_result(None)

        def end_late(_: Future[None]) -> None:
            try:
                self._executor.submit(_end_quietly, client, offer, connection, session)
            except RuntimeError:
                connection.close()

        try:
            await write(settled)
        except BaseException:
            over.add_done_callback(end_late)
            raise
        waiting = [connection]
        try:
            await self.in_thread(lambda cancel: client.end(offer, waiting.pop(), session, deadline, cancel), deadline)
        finally:
            # Still here: the thread never came to it. To the target the end of the connection is the end of the write.
            for unused in waiting:
                unused.close()


def _require_stamp(session: str, proof: Proof, found: StatusEntry) -> None:
    """Raise unless a session stands on its holder's board. One host has one lease clock, so its expiry counts here."""
    if found.stamp != proof.stamp:
        raise TransferRefused(f"KV session {session!r} is not held here: it was released while it was read, or before")
    late = lease_clock() - found.expires
    if late >= 0:
        raise TransferLate(f"the lease of KV session {session!r} ended {late:.3f} s ago: its blocks may be reused")


def neighbour(offer: TransferOffer) -> LocalSide:
    """The endpoint of this process that made the offer. Raises `PeerLost` when it is closed."""
    side = in_process.get(offer.incarnation)
    if side is None:
        raise PeerLost(f"the KV transfer endpoint of {offer.worker_id} in this process is closed")
    return side


def _end_quietly(client: TcpClient, offer: TransferOffer, connection: Any, session: str) -> None:
    try:
        client.end(offer, connection, session, Deadline.after(wire.HANDSHAKE_SECONDS), Cancel())
    except TransferError:
        # The session is over on the other side as well, which is all that this had to achieve.
        return


def _whole_regions(pattern: Pattern, pool: KvPool) -> list[int] | None:
    """The regions of a pattern that takes nothing but whole ones."""
    size = pool.layout.region_bytes
    if all(offset == 0 and length == size for _, offset, length in pattern):
        return [region for region, _, _ in pattern]
    return None


def _pattern_rows(
    local: PoolGeometry,
    remote: PoolGeometry,
    local_blocks: Sequence[int],
    remote_blocks: Sequence[int],
    pattern: Pattern,
) -> Any:
    """Byte ranges (local address, remote address, bytes) of a pattern. Shape [pieces * blocks, 3]."""
    import numpy as np

    rows = np.empty((len(pattern), len(local_blocks), 3), np.int64)
    mine, theirs = np.asarray(local_blocks, np.int64), np.asarray(remote_blocks, np.int64)
    for number, (region, offset, length) in enumerate(pattern):
        here, there = local.regions[region], remote.regions[region]
        rows[number, :, 0] = here.address + offset + mine * here.stride
        rows[number, :, 1] = there.address + offset + theirs * there.stride
        rows[number, :, 2] = length
    return rows.reshape(-1, 3)


def _drop(ended: Future[Any], discard: Callable[[Any], object] | None) -> None:
    """Give a result that nobody waits for any more to whoever knows what to do with it."""
    if discard is not None and not ended.cancelled() and ended.exception() is None:
        discard(ended.result())


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take note of an outcome that nobody waits for any more."""
    if not future.cancelled():
        future.exception()
