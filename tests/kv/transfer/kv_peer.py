"""A process with an endpoint of its own, driven over a pipe: the other side of every test here."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer import (
    Access,
    CanonicalKv,
    KvEndpoint,
    KvPool,
    KvRegion,
    TransferSettings,
    export_blocks,
    import_blocks,
    push_blocks,
)

SECRET = b"the secret of the tests"
LAYOUT = KvLayout(layers=2, kv_heads=2, head_size=16, block_size=8, dtype="bfloat16")
BIG = KvLayout(layers=2, kv_heads=8, head_size=64, block_size=16, dtype="bfloat16", dims="LKNHD")

QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}
os.environ.update(QUIET)


def fill(pool: KvPool, seed: int) -> None:
    """Make every block's content its own."""
    rng = random.Random(seed)
    for block in range(pool.num_blocks):
        for piece in pool.slices([block], pool.whole):
            piece[:] = rng.randbytes(len(piece))


def content(pool: KvPool, blocks) -> list[bytes]:
    """The bytes of blocks, region after region."""
    return [b"".join(bytes(piece) for piece in pool.slices([block], pool.by_region)) for block in blocks]


def unmappable_pool(layout: KvLayout, num_blocks: int) -> tuple[KvPool, int, int]:
    """A pool that can really be unmapped: address and size are what munmap takes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    size = layout.block_bytes * num_blocks
    base = libc.mmap(None, size, 3, 0x22, -1, 0)
    regions = [KvRegion(base + n * layout.region_bytes, layout.block_bytes) for n in range(layout.region_count)]
    return KvPool(layout, regions, num_blocks, owner=None), base, size


class Served:
    """What the child does when asked. Every method is one question."""

    def __init__(self, layout, num_blocks, settings, worker_id, secret):
        self.pool, self.base, self.size = unmappable_pool(layout, num_blocks)
        self.arguments = (worker_id, secret, settings)

    async def start(self):
        worker_id, secret, settings = self.arguments
        self.endpoint = await KvEndpoint.open(self.pool, worker_id=worker_id, secret=secret, settings=settings)

    async def offer(self):
        return self.endpoint.offer

    async def fill(self, seed):
        fill(self.pool, seed)

    async def content(self, blocks):
        return content(self.pool, blocks)

    async def export(self, session, blocks, lease=30.0, tokens=None):
        shard = await export_blocks(self.endpoint, session, blocks, Access.READ, lease)
        return CanonicalKv(session, tokens or len(blocks) * self.pool.layout.block_size, (shard,))

    async def expose(self, session, blocks, lease=30.0):
        shard = await export_blocks(self.endpoint, session, blocks, Access.WRITE, lease)
        return CanonicalKv(session, len(blocks) * self.pool.layout.block_size, (shard,))

    async def revoke(self, session):
        return self.endpoint.revoke(session)

    async def pull(self, kv, blocks, seconds=10.0, cached_tokens=0):
        return await import_blocks(
            self.endpoint, kv, blocks, cached_tokens=cached_tokens, deadline=Deadline.after(seconds)
        )

    async def push(self, kv, blocks, first_token, tokens, seconds=10.0, layers=None):
        return await push_blocks(
            self.endpoint,
            kv,
            blocks,
            first_token=first_token,
            tokens=tokens,
            layers=layers,
            deadline=Deadline.after(seconds),
        )

    async def blocks_in_flight(self):
        return sorted(self.endpoint.inflight.blocks)

    async def freed(self, blocks):
        """Free blocks and say which came back at once."""
        out = []
        self.endpoint.free_when_idle(blocks, out.extend)
        return sorted(out)

    async def close(self):
        return await self.endpoint.close()

    async def unmap(self):
        assert ctypes.CDLL(None).munmap(ctypes.c_void_p(self.base), ctypes.c_size_t(self.size)) == 0

    async def idle_cpu(self, seconds):
        """Processor seconds that this process uses while it does nothing."""
        before = time.process_time()
        await asyncio.sleep(seconds)
        return time.process_time() - before


def _main(pipe, *arguments) -> None:
    async def run() -> None:
        served = Served(*arguments)
        try:
            await served.start()
        except Exception as error:  # noqa: BLE001 - raised where the test is
            pipe.send(error)
            return
        pipe.send(None)
        loop = asyncio.get_running_loop()
        while True:
            question = await loop.run_in_executor(None, pipe.recv)
            if question is None:
                break
            name, args, kwargs = question
            try:
                pipe.send((True, await getattr(served, name)(*args, **kwargs)))
            except Exception as error:  # noqa: BLE001 - raised where the test is
                pipe.send((False, f"{type(error).__name__}: {error}"))

    asyncio.run(run())
    os._exit(0)


class Peer:
    """The test's handle on the process. Asking is synchronous and bounded."""

    def __init__(self, *, layout=LAYOUT, num_blocks=64, settings=None, worker_id="holder", secret=SECRET, seed=1):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_main,
            args=(theirs, layout, num_blocks, settings or TransferSettings(), worker_id, secret),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        assert self._pipe.poll(30), "the peer process did not start"
        error = self._pipe.recv()
        assert error is None, error
        self.ask("fill", seed)

    def post(self, name, *args, **kwargs):
        self._pipe.send((name, args, kwargs))

    def answer(self, seconds=30.0):
        assert self._pipe.poll(seconds), f"the peer process did not answer in {seconds} s"
        good, value = self._pipe.recv()
        if not good:
            raise RuntimeError(value)
        return value

    def ask(self, name, *args, **kwargs):
        self.post(name, *args, **kwargs)
        return self.answer()

    def signal(self, number):
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            state = Path(f"/proc/{self.process.pid}/stat")
            until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def kill(self):
        self.process.kill()
        self.process.join(10)

    def stop(self):
        if self.process.is_alive():
            self.kill()
        self._pipe.close()
        self.process.close()


def until(condition, seconds=10.0):
    """Wait for a condition, at most so long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.001)


async def soon(condition, seconds=10.0):
    """As `until`, with the event loop running."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        await asyncio.sleep(0.001)
