"""Endpoints of one process: copies in memory, device memory through a copier, and sockets that misbehave."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

import pytest
from kv_peer import BIG, LAYOUT, SECRET, content, fill, soon, until
from transports import TRANSPORTS

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer import (
    Access,
    CanonicalKv,
    ChecksumMismatch,
    KvEndpoint,
    KvPool,
    KvShard,
    MemoryKind,
    PeerLost,
    TransferError,
    TransferLate,
    TransferRefused,
    TransferSettings,
    Transport,
    export_blocks,
    import_blocks,
    push_blocks,
)
from core.kv.transfer.execute import copy_bytes

TCP = TRANSPORTS["tcp"]
MEMORY = TransferSettings(transport=Transport.MEMORY, checksum=True)
OTHER = KvLayout(layers=2, kv_heads=2, head_size=16, block_size=12, dtype="bfloat16", dims="HND")


@pytest.mark.parametrize("layout", [LAYOUT, OTHER], ids=["same layout", "other layout"])
async def test_memory_reads_and_writes(layout, endpoints):
    """Copied or converted directly, under the same grants and checksums as everything else."""
    holder = await endpoints(MEMORY, worker_id="holder", seed=1)
    mine = await endpoints(MEMORY, layout=layout)
    kv = CanonicalKv("s", 24, (await export_blocks(holder, "s", [5, 3, 9], Access.READ, 10),))
    local = [2, 8, 4][: -(-24 // layout.block_size)]
    (report,) = await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    assert (report.transport, report.bytes) == ("memory", 3 * LAYOUT.block_bytes)
    room = CanonicalKv("w", 24, (await export_blocks(holder, "w", [20, 21, 22], Access.WRITE, 10),))
    await push_blocks(mine, room, local, first_token=0, tokens=24, deadline=Deadline.after(10))
    assert content(holder.pool, [20, 21, 22]) == content(holder.pool, [5, 3, 9])
    fill(holder.pool, 2)
    with pytest.raises(ChecksumMismatch):
        await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    holder.revoke("s")
    with pytest.raises(TransferRefused):
        await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    await holder.close()
    with pytest.raises(PeerLost, match="in this process is closed"):
        await import_blocks(mine, kv, local, deadline=Deadline.after(10))


class Device:
    """Stands in for a device: its memory can be reached only through the copier, which counts."""

    def __init__(self, layout, num_blocks=64):
        self.host = KvPool.allocate(layout, num_blocks)
        self.copied = 0
        self.pool = KvPool(
            layout, self.host.regions, num_blocks, owner=self.host, memory=MemoryKind.VRAM, copier=self.copy
        )

    def copy(self, ranges):
        self.copied += sum(length for _, _, length in ranges)
        copy_bytes(ranges)


@pytest.mark.parametrize("layout", [LAYOUT, OTHER], ids=["same layout", "other layout"])
@pytest.mark.parametrize("settings", [TCP, MEMORY], ids=["tcp", "memory"])
async def test_device_memory_goes_through_its_copier(settings, layout, endpoints):
    """Without NIXL, blocks in device memory are staged through the host, both ways, with checksums."""
    holder, target = Device(LAYOUT), Device(layout)
    fill(holder.host, 1)
    checked = TransferSettings(transport=settings.transport, checksum=True)
    async with (
        await KvEndpoint.open(holder.pool, worker_id="a", secret=SECRET, settings=checked) as a,
        await KvEndpoint.open(target.pool, worker_id="b", secret=SECRET, settings=checked) as b,
    ):
        kv = CanonicalKv("s", 24, (await export_blocks(a, "s", [5, 3, 9], Access.READ, 10),))
        local = [2, 8, 4][: -(-24 // layout.block_size)]
        await import_blocks(b, kv, local, deadline=Deadline.after(10))
        # Within the process one copier does for both sides.
        sides = 2 if settings is TCP else 1
        assert holder.copied + target.copied >= (sides + 1) * 3 * LAYOUT.block_bytes
        room = CanonicalKv("w", 24, (await export_blocks(a, "w", [20, 21, 22], Access.WRITE, 10),))
        await push_blocks(b, room, local, first_token=0, tokens=24, deadline=Deadline.after(10))
    assert content(holder.host, [20, 21, 22]) == content(holder.host, [5, 3, 9])


async def test_a_session_that_ends_while_its_blocks_are_sent(endpoints):
    """The bytes may all arrive, but the holder's last word says that they were not held: refused, and freed late."""
    holder = await endpoints(TCP, layout=BIG, worker_id="holder", seed=1, num_blocks=256)
    mine = await endpoints(TCP, layout=BIG, num_blocks=256)
    blocks = list(range(256))
    kv = CanonicalKv("s", 256 * BIG.block_size, (await export_blocks(holder, "s", blocks, Access.READ, 10),))

    async def catch() -> bool:
        """Whether the session ended in the middle of a read, which was then refused."""
        reading = asyncio.ensure_future(import_blocks(mine, kv, blocks, deadline=Deadline.after(10)))
        await soon(lambda: holder.inflight.blocks or reading.done())
        holder.revoke("s")
        freed = []
        holder.free_when_idle(blocks, freed.extend)
        if freed:
            await asyncio.gather(reading, return_exceptions=True)
            holder.grant("s", blocks, Access.READ, 10)
            return False
        with pytest.raises(TransferRefused, match="is not held here"):
            await reading
        await soon(lambda: sorted(freed) == blocks)
        return True

    for _ in range(50):
        if await catch():
            return
    pytest.fail("no read could be caught in the middle")


async def test_many_requests_at_once(endpoints):
    """200 reads and writes at once over 4 threads: all arrive, and nothing is left claimed."""
    holder = await endpoints(TCP, worker_id="holder", seed=1, num_blocks=256)
    mine = await endpoints(TCP, num_blocks=256)
    theirs = content(holder.pool, range(200))

    async def one(number):
        shard = await export_blocks(holder, f"s{number}", [number], Access.READ, 30)
        await import_blocks(mine, CanonicalKv(f"s{number}", 8, (shard,)), [199 - number], deadline=Deadline.after(30))
        holder.revoke(f"s{number}")

    await asyncio.gather(*(one(number) for number in range(200)))
    assert content(mine.pool, range(199, -1, -1)) == theirs
    assert not holder.grants.sessions
    assert not holder.inflight.blocks
    assert not mine.inflight.blocks


async def test_requests_beyond_the_threads_wait_within_their_deadlines(endpoints):
    """A peer that accepts and says nothing occupies every thread; a later request ends at its own deadline."""
    one_thread = TransferSettings(transport=Transport.TCP, parallel=1)
    mine = await endpoints(one_thread)
    holder = await endpoints(TCP, worker_id="holder", seed=1)
    good = CanonicalKv("s", 8, (await export_blocks(holder, "s", [1], Access.READ, 30),))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        mute = await endpoints(TCP, worker_id="mute")
        data = mute.offer.replace(b"\xa4port" + _packed(mute.described.tcp.port), b"\xa4port" + _packed(port))
        assert data != mute.offer
        stuck = asyncio.ensure_future(
            import_blocks(mine, CanonicalKv("s", 8, (KvShard(data, (1,)),)), [0], deadline=Deadline.after(1.0))
        )
        await soon(lambda: mine.inflight.blocks)
        with pytest.raises(TransferLate):
            await import_blocks(mine, good, [1], deadline=Deadline.after(0.2))
        with pytest.raises(TransferLate):
            await stuck
    await import_blocks(mine, good, [1], deadline=Deadline.after(10))


def _packed(port):
    return b"\xcd" + struct.pack(">H", port)


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, struct.pack(">I", 3) + b"\x93\x01\x02"]
)
async def test_noise_is_turned_away(noise, endpoints):
    """What does not speak the protocol is disconnected, and the endpoint goes on serving."""
    holder = await endpoints(TCP, worker_id="holder", seed=1)
    address = decode(holder)
    with socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(noise)
        received = b""
        # The endpoint may have hung up already.
        with suppress(OSError):
            stranger.shutdown(socket.SHUT_WR)
            while chunk := await asyncio.to_thread(stranger.recv, 4096):
                received += chunk
    # Nothing but the challenge was said.
    assert len(received) < 200
    until(lambda: holder.connections == 0)
    mine = await endpoints(TCP)
    kv = CanonicalKv("s", 8, (await export_blocks(holder, "s", [1], Access.READ, 30),))
    await import_blocks(mine, kv, [0], deadline=Deadline.after(10))


def decode(endpoint):
    return endpoint.described.tcp.host, endpoint.described.tcp.port


async def test_a_kept_connection_that_died_is_replaced(endpoints):
    """A connection cut while it was idle does not fail the next request."""
    holder = await endpoints(TCP, worker_id="holder", seed=1)
    mine = await endpoints(TCP)
    kv = CanonicalKv("s", 8, (await export_blocks(holder, "s", [1], Access.READ, 30),))
    await import_blocks(mine, kv, [0], deadline=Deadline.after(10))
    assert holder.connections == 1
    holder.drop_connections()
    until(lambda: holder.connections == 0)
    await import_blocks(mine, kv, [0], deadline=Deadline.after(10))


async def test_arguments_that_contradict_each_other_are_named(endpoints):
    mine = await endpoints(TCP)
    holder = await endpoints(TCP, worker_id="holder")
    reading = {"deadline": Deadline.after(10)}
    with pytest.raises(ValueError, match=r"blocks \[64\] lie outside the pool of 64 blocks"):
        await mine.read(holder.offer, "s", [1], [64], **reading)
    with pytest.raises(ValueError, match=r"blocks \[99\] lie outside"):
        await mine.read(holder.offer, "s", [99], [1], **reading)
    with pytest.raises(ValueError, match="named twice"):
        await mine.read(holder.offer, "s", [1, 2], [3, 3], **reading)
    with pytest.raises(ValueError, match="16 tokens after 0 do not fit the local list of 1 blocks of 8"):
        await mine.read(holder.offer, "s", [1, 2], [3], **reading)
    with pytest.raises(ValueError, match="checksums must be one a remote block"):
        await mine.read(holder.offer, "s", [1, 2], [3, 4], checksums=[1], **reading)
    assert not mine.inflight.blocks


async def test_models_that_differ_are_refused(endpoints):
    mine = await endpoints(TCP)
    other = KvLayout(layers=3, kv_heads=2, head_size=16, block_size=8, dtype="bfloat16")
    holder = await endpoints(TCP, worker_id="holder", layout=other)
    with pytest.raises(TransferRefused, match="KV layouts differ in layers: 2 here and 3 there"):
        await mine.read(holder.offer, "s", [1], [3], deadline=Deadline.after(10))


async def test_a_closed_endpoint_refuses_and_exposes_nothing(endpoints):
    mine, holder = await endpoints(TCP), await endpoints(TCP, worker_id="holder", seed=1)
    kv = CanonicalKv("s", 8, (await export_blocks(holder, "s", [1], Access.READ, 30),))
    assert await holder.close()
    assert await holder.close()
    with pytest.raises(TransferError):
        await import_blocks(mine, kv, [0], deadline=Deadline.after(5))
    assert await mine.close()
    with pytest.raises(TransferRefused, match="of reader is closed"):
        await import_blocks(mine, kv, [0], deadline=Deadline.after(5))
