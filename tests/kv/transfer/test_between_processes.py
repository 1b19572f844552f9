"""Reads and writes between two processes, over every transport, and every way in which they can go wrong."""

from __future__ import annotations

import asyncio
import random
import signal

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kv_peer import BIG, LAYOUT, SECRET, content, fill, soon
from transports import TRANSPORTS, needs_nixl

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer import (
    Access,
    CanonicalKv,
    ChecksumMismatch,
    KvShard,
    PeerLost,
    TransferError,
    TransferLate,
    TransferRefused,
    import_blocks,
    push_blocks,
)

pytestmark = pytest.mark.timeout(90)
needs_the_peer = pytest.mark.parametrize(
    "settings", [TRANSPORTS["tcp"], pytest.param(TRANSPORTS["nixl-tcp"], marks=needs_nixl)], ids=["tcp", "nixl-tcp"]
)
"""Transports over which a holder must do something for its blocks to arrive: not shared memory."""


async def refused(reading, kind):
    with pytest.raises(kind) as caught:
        await reading
    assert caught.value.retryable
    return str(caught.value)


async def under_way(endpoint):
    """A read has been posted."""
    await soon(lambda: endpoint.inflight.blocks)


async def test_any_blocks_arrive_as_they_are(settings, peers, endpoints):
    """1 to 1000 blocks, any places on either side, read and written: equal bytes, and nothing else is touched."""
    count = 1000
    holder = peers(settings=settings, num_blocks=count)
    mine = await endpoints(settings, num_blocks=count)
    theirs = holder.ask("content", range(count))
    number = iter(range(10_000))
    loop = asyncio.get_running_loop()

    async def once(amount, seed):
        rng = random.Random(seed)
        fill(mine.pool, 2)
        remote, local = rng.sample(range(count), amount), rng.sample(range(count), amount)
        before = content(mine.pool, range(count))
        kv = holder.ask("export", f"r{next(number)}", remote)
        (report,) = await import_blocks(mine, kv, local, deadline=Deadline.after(20))
        assert report.bytes == amount * LAYOUT.block_bytes
        expected = dict(enumerate(before)) | dict(zip(local, (theirs[block] for block in remote), strict=True))
        assert content(mine.pool, range(count)) == [expected[block] for block in range(count)]
        # And back into other places of the holder, which gives it the same content in a new order.
        target = rng.sample(range(count), amount)
        room = holder.ask("expose", f"w{next(number)}", target)
        await push_blocks(
            mine, room, local, first_token=0, tokens=amount * LAYOUT.block_size, deadline=Deadline.after(20)
        )
        for place, block in zip(target, remote, strict=True):
            rest[place] = theirs[block]
        assert holder.ask("content", range(count)) == rest
        holder.ask("fill", 1)

    # The worker loop of hypothesis is synchronous; it runs in a thread and hands each example to this loop.
    @hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(1, count), st.integers(0, 2**32))
    def examples(amount, seed):
        nonlocal rest
        rest = list(theirs)
        asyncio.run_coroutine_threadsafe(once(amount, seed), loop).result(60)

    rest = list(theirs)
    await asyncio.to_thread(examples)
    for amount in (1, count):
        rest = list(theirs)
        await once(amount, amount)
    assert not mine.inflight.blocks


async def test_only_missing_tokens_are_moved(settings, peers, endpoints):
    """A prefix that the decode side has already is neither fetched nor overwritten."""
    holder = peers(settings=settings)
    mine = await endpoints(settings, seed=2)
    before = content(mine.pool, range(64))
    kv = holder.ask("export", "s", [5, 6, 7, 8], tokens=30)
    (report,) = await import_blocks(mine, kv, [1, 2, 3, 4], cached_tokens=16, deadline=Deadline.after(10))
    assert report.bytes == 2 * LAYOUT.block_bytes
    after = content(mine.pool, range(64))
    assert after[3:5] == holder.ask("content", [7, 8])
    assert after[:3] + after[5:] == before[:3] + before[5:]
    assert await import_blocks(mine, kv, [1, 2, 3, 4], cached_tokens=30, deadline=Deadline.after(10)) == []


@pytest.mark.parametrize("dims", ["HNKD", "LKNHD"])
async def test_unlike_layouts_are_converted(settings, dims, peers, endpoints):
    """Other block size and order of dimensions on the peer: pulled, and pushed back in chunks and by layer."""
    theirs = KvLayout(layers=2, kv_heads=2, head_size=16, block_size=12, dtype="bfloat16", dims=dims)
    holder = peers(settings=settings, layout=theirs)
    mine = await endpoints(settings)
    kv = holder.ask("export", "s", [9, 3, 11, 30], tokens=45)
    local = [7, 1, 5, 20, 0, 2]
    await import_blocks(mine, kv, local, cached_tokens=8, deadline=Deadline.after(10))
    # The cached tokens come in a second step: a chunk.
    await import_blocks(mine, CanonicalKv(kv.session, 8, kv.shards), local, deadline=Deadline.after(10))
    room = holder.ask("expose", "w", [40, 41, 42, 43])
    for first, tokens in ((0, 20), (20, 25)):
        for layer in range(2):
            await push_blocks(
                mine,
                room,
                local,
                first_token=first,
                tokens=tokens,
                layers=range(layer, layer + 1),
                deadline=Deadline.after(10),
            )
    first, second = holder.ask("content", [9, 3, 11]), holder.ask("content", [40, 41, 42])
    assert first == second


async def test_tensor_parallel_ranks_are_joined_and_split(settings, peers, endpoints):
    """Two ranks into one pool, and one pool into two ranks."""
    fields = {"layers": 2, "kv_heads": 4, "head_size": 16, "dtype": "bfloat16"}
    ranks = [
        peers(
            settings=settings,
            layout=KvLayout(**fields, block_size=16, dims="HND", tp_size=2, tp_rank=rank),
            worker_id="prefill",
            seed=rank,
        )
        for rank in range(2)
    ]
    mine = await endpoints(settings, layout=KvLayout(**fields, block_size=8))
    parts = [rank.ask("export", "s", [4, 2]) for rank in ranks]
    kv = CanonicalKv("s", 32, tuple(part.shards[0] for part in parts))
    local = [3, 1, 0, 2]
    reports = await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    assert len(reports) == 2
    rooms = [rank.ask("expose", "w", [10, 11]) for rank in ranks]
    target = CanonicalKv("w", 32, tuple(room.shards[0] for room in rooms))
    await push_blocks(mine, target, local, first_token=0, tokens=32, deadline=Deadline.after(10))
    for rank in ranks:
        assert rank.ask("content", [4, 2]) == rank.ask("content", [10, 11])


async def test_checksums_catch_reused_blocks(settings, peers, endpoints):
    """Blocks that were overwritten after their export are noticed, whole or converted."""
    checked = msgspec.structs.replace(settings, checksum=True)
    holder = peers(settings=checked)
    for layout in (LAYOUT, KvLayout(layers=2, kv_heads=2, head_size=16, block_size=4, dtype="bfloat16", dims="HND")):
        mine = await endpoints(checked, layout=layout, worker_id=f"reader-{layout.dims}")
        holder.ask("fill", 1)
        kv = holder.ask("export", f"s-{layout.dims}", [1, 2])
        local = list(range(16 // layout.block_size))
        await import_blocks(mine, kv, local, deadline=Deadline.after(10))
        holder.ask("fill", 2)
        text = await refused(import_blocks(mine, kv, local, deadline=Deadline.after(10)), ChecksumMismatch)
        assert "2 of 2 KV blocks arrived with other content" in text
        await mine.close()


async def test_a_late_read_is_refused_before_it_starts(settings, peers, endpoints):
    """A deadline that has passed means no transfer at all."""
    holder = peers(settings=settings)
    mine = await endpoints(settings, seed=2)
    before = content(mine.pool, range(64))
    kv = holder.ask("export", "s", [1])
    await refused(import_blocks(mine, kv, [0], deadline=Deadline.after(-1)), TransferLate)
    assert content(mine.pool, range(64)) == before


async def test_an_ended_or_unknown_session_is_refused_by_the_holder(settings, peers, endpoints):
    holder = peers(settings=settings)
    mine = await endpoints(settings)
    kv = holder.ask("export", "s", [1])
    await import_blocks(mine, kv, [0], deadline=Deadline.after(10))
    assert holder.ask("revoke", "s")
    text = await refused(import_blocks(mine, kv, [0], deadline=Deadline.after(10)), TransferRefused)
    assert "KV session 's' is not held here" in text
    short = holder.ask("export", "t", [1], lease=1e-6)
    text = await refused(import_blocks(mine, short, [0], deadline=Deadline.after(10)), TransferLate)
    assert "the lease of KV session 't' ended" in text
    room = holder.ask("expose", "w", [1])
    text = await refused(import_blocks(mine, room, [0], deadline=Deadline.after(10)), TransferRefused)
    assert "may be used to write, not to read" in text
    wide = CanonicalKv("s2", 16, (KvShard(kv.shards[0].offer, (1, 2)),))
    holder.ask("export", "s2", [1])
    text = await refused(import_blocks(mine, wide, [0, 1], deadline=Deadline.after(10)), TransferRefused)
    assert "blocks [2] do not belong to KV session 's2'" in text


async def test_a_stranger_is_refused(settings, peers, endpoints):
    """Without the deployment's secret nothing is served, whatever else the stranger knows."""
    holder = peers(settings=settings)
    stranger = await endpoints(settings, secret=b"another secret, as long")
    kv = holder.ask("export", "s", [1])
    text = await refused(import_blocks(stranger, kv, [0], deadline=Deadline.after(10)), TransferRefused)
    assert "does not know the deployment's secret" in text
    friend = await endpoints(settings, secret=SECRET, worker_id="friend")
    await import_blocks(friend, kv, [0], deadline=Deadline.after(10))


async def test_a_dead_holder_is_reported(settings, peers, endpoints):
    """SIGKILL before a transfer, with and without an earlier connection."""
    mine = await endpoints(settings)
    known, unknown = peers(settings=settings), peers(settings=settings, worker_id="other")
    kv = known.ask("export", "s", [1])
    await import_blocks(mine, kv, [0], deadline=Deadline.after(10))
    other = unknown.ask("export", "s", [1])
    for peer, ticket in ((known, kv), (unknown, other)):
        peer.kill()
        await refused(import_blocks(mine, ticket, [0], deadline=Deadline.after(10)), PeerLost)
    await soon(lambda: not mine.inflight.blocks)


@needs_the_peer
async def test_a_hung_holder_costs_no_more_than_the_deadline(settings, peers, endpoints):
    """SIGSTOP: the read ends at its deadline, and the target blocks are freed only when nothing can touch them."""
    holder = peers(settings=settings, layout=BIG)
    mine = await endpoints(settings, layout=BIG)
    kv = holder.ask("export", "s", list(range(64)))
    local = list(range(64))
    await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    holder.signal(signal.SIGSTOP)
    freed = []
    try:
        started = asyncio.get_running_loop().time()
        await refused(import_blocks(mine, kv, local, deadline=Deadline.after(0.5)), TransferLate)
        assert asyncio.get_running_loop().time() - started < 5
        mine.free_when_idle(local, freed.extend)
    finally:
        holder.signal(signal.SIGCONT)
    await soon(lambda: sorted(freed) == local)
    mine.check_integrity()
    # The peer is well again, and so is the connection to it.
    kv = holder.ask("export", "t", list(range(64)))
    await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    assert content(mine.pool, local) == holder.ask("content", range(64))


@needs_the_peer
async def test_a_holder_killed_in_the_middle_of_a_transfer(settings, peers, endpoints):
    """The read fails at once, not at its deadline, and the blocks come back."""
    holder = peers(settings=settings, layout=BIG)
    mine = await endpoints(settings, layout=BIG)
    local = list(range(64))
    kv = holder.ask("export", "s", local)
    await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    holder.signal(signal.SIGSTOP)
    reading = asyncio.ensure_future(import_blocks(mine, kv, local, deadline=Deadline.after(60)))
    await under_way(mine)
    holder.process.kill()
    await refused(asyncio.wait_for(reading, 20), PeerLost)
    await soon(lambda: not mine.inflight.blocks)


async def test_a_restarted_worker_is_met_anew(settings, peers, endpoints):
    """Same worker name, new life: old tickets fail, new ones work, and what was known of the old life is dropped."""
    mine = await endpoints(settings)
    first = peers(settings=settings, worker_id="prefill-0")
    old = first.ask("export", "s", [1, 2])
    await import_blocks(mine, old, [0, 1], deadline=Deadline.after(10))
    first.kill()
    second = peers(settings=settings, worker_id="prefill-0", seed=7)
    new = second.ask("export", "s", [1, 2])
    assert old.shards[0].offer != new.shards[0].offer
    await import_blocks(mine, new, [0, 1], deadline=Deadline.after(10))
    assert content(mine.pool, [0, 1]) == second.ask("content", [1, 2])
    await refused(import_blocks(mine, old, [2, 3], deadline=Deadline.after(10)), TransferError)
    await import_blocks(mine, new, [0, 1], deadline=Deadline.after(10))
    mine.forget("prefill-0")
    await import_blocks(mine, new, [0, 1], deadline=Deadline.after(10))


@needs_the_peer
async def test_a_cancelled_read_leaves_nothing_behind(settings, peers, endpoints):
    """The client has gone in the middle: claims end, and the endpoint goes on working."""
    holder = peers(settings=settings, layout=BIG)
    mine = await endpoints(settings, layout=BIG)
    local = list(range(64))
    kv = holder.ask("export", "s", local)
    await import_blocks(mine, kv, local, deadline=Deadline.after(10))
    holder.signal(signal.SIGSTOP)
    reading = asyncio.ensure_future(import_blocks(mine, kv, local, deadline=Deadline.after(60)))
    await under_way(mine)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    holder.signal(signal.SIGCONT)
    await soon(lambda: not mine.inflight.blocks)
    await import_blocks(mine, kv, local, deadline=Deadline.after(10))


async def test_blocks_that_a_peer_is_writing_are_freed_after_it(settings, peers, endpoints):
    """A session ends while a peer that hangs writes to its blocks: they stay claimed until the peer is gone."""
    writer = peers(settings=settings, layout=BIG, worker_id="writer")
    mine = await endpoints(settings, layout=BIG)
    blocks = list(range(64))
    mine.grant("w", blocks, Access.WRITE, 60)
    room = CanonicalKv("w", 64 * BIG.block_size, (KvShard(mine.offer, tuple(blocks)),))
    writer.ask("push", room, blocks, 0, 64 * BIG.block_size)
    # Writes again and again until one is caught in the middle.
    for _ in range(200):
        writer.post("push", room, blocks, 0, 64 * BIG.block_size)
        await soon(lambda: mine.inflight.blocks or writer._pipe.poll())
        writer.signal(signal.SIGSTOP)
        if mine.inflight.blocks:
            break
        writer.signal(signal.SIGCONT)
        writer.answer()
    else:
        pytest.fail("no write could be caught in the middle")
    mine.revoke("w")
    freed = []
    mine.free_when_idle(blocks, freed.extend)
    assert not freed
    mine.check_integrity()
    writer.kill()
    await soon(lambda: sorted(freed) == blocks)
