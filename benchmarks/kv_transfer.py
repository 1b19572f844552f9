"""KV transfer between two processes: ours against a raw NIXL loop and a plain socket loop, on the same blocks.

    python -m benchmarks.kv_transfer [--rounds 20] [--blocks 512]

512 blocks of 64 KiB, in random order, out of a pool of 1024 on either side. The contenders take turns within each
round, so that they meet the same machine; the best round of each counts, and what is compared are ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import multiprocessing
import os
import random
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer import Access, CanonicalKv, KvEndpoint, KvPool, TransferSettings, Transport
from core.kv.transfer.canonical import export_blocks, import_blocks
from core.kv.transfer.nixl_agent import NixlAgent

SECRET = b"benchmark secret of the deployment"
POOL_BLOCKS = 1024
LAYOUT = KvLayout(layers=2, kv_heads=8, head_size=64, block_size=16, dtype="bfloat16", dims="LKNHD")
_SOCKET_BATCH = 128


def have_nixl() -> bool:
    """Whether NIXL is installed here."""
    return any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl_rocm"))


def make_pool(fill: bool) -> KvPool:
    """A pool whose pages are all present; with `fill`, of random bytes."""
    pool = KvPool.allocate(LAYOUT, POOL_BLOCKS)
    block = random.Random(1).randbytes(LAYOUT.block_bytes) if fill else bytes(LAYOUT.block_bytes)
    for number, (view,) in enumerate(pool.slices([block], pool.whole) for block in range(POOL_BLOCKS)):
        view[:] = block
        view[0] = number % 256 if fill else 0
    return pool


class RawNixl:
    """The least that NIXL needs: descriptors prepared once, one request a transfer, a loop that waits for it."""

    def __init__(self, name: str, pool: KvPool, ucx: str) -> None:
        self.agent = NixlAgent(name, pool, ucx=ucx)
        self.raw = self.agent._agent
        self.pool = pool

    def connect(self, metadata: bytes, spans: list[tuple[int, int]]) -> None:
        """Prepare both sides' descriptors."""
        import numpy as np

        peer = self.raw.add_remote_agent(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        size = LAYOUT.block_bytes

        def every(base: int) -> Any:
            return np.array([(base + block * size, size, 0) for block in range(POOL_BLOCKS)], np.uint64)

        self.here = self.raw.prep_xfer_dlist("NIXL_INIT_AGENT", every(self.pool.spans[0][0]), "DRAM")
        self.there = self.raw.prep_xfer_dlist(peer, every(spans[0][0]), "DRAM")

    def read(self, remote: list[int], local: list[int]) -> None:
        """One transfer, to its end."""
        import numpy as np

        handle = self.raw.make_prepped_xfer(
            "READ", self.here, np.array(local, np.int32), self.there, np.array(remote, np.int32)
        )
        state = self.raw.transfer(handle)
        while state == "PROC":
            state = self.raw.check_xfer_state(handle)
        assert state == "DONE", state
        handle.release()


def holder(pipe: Connection, count: int) -> None:
    """The process that holds the blocks."""
    pool = make_pool(fill=True)

    def serve_socket(listener: socket.socket, order: list[int]) -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(4):
            for start in range(0, count, _SOCKET_BATCH):
                buffers = pool.slices(order[start : start + _SOCKET_BATCH], pool.whole)
                left = sum(map(len, buffers))
                while left:
                    sent = connection.sendmsg(buffers)
                    left -= sent
                    while left and sent >= len(buffers[0]):
                        sent -= len(buffers.pop(0))
                    if left and sent:
                        buffers[0] = buffers[0][sent:]
        connection.close()

    async def run() -> None:
        order = random.Random(2).sample(range(POOL_BLOCKS), count)
        settings = TransferSettings(transport=Transport.AUTO if have_nixl() else Transport.TCP)
        async with await KvEndpoint.open(pool, worker_id="holder", secret=SECRET, settings=settings) as endpoint:
            raws = [RawNixl(f"raw-holder-{ucx}", pool, ucx) for ucx in ("", "TLS=tcp")] if have_nixl() else []
            endpoint.grant("bench", order, Access.READ, 3600)
            proof = endpoint.grants.proof("bench")
            listener = socket.create_server(("127.0.0.1", 0))
            plain = asyncio.get_running_loop().run_in_executor(None, serve_socket, listener, order)
            pipe.send(
                {
                    "offer": endpoint.offer,
                    "order": order,
                    "proof": proof,
                    "raw": [raw.agent.metadata for raw in raws],
                    "spans": list(pool.spans),
                    "port": listener.getsockname()[1],
                    "pid": os.getpid(),
                }
            )
            while (question := await asyncio.to_thread(pipe.recv)) is not None:
                # The holder's half of one request: grant, describe, and afterwards revoke.
                shard = await export_blocks(endpoint, question, order[:1], Access.READ, 30)
                pipe.send(msgspec.msgpack.encode(CanonicalKv(question, LAYOUT.block_size, (shard,))))
                await asyncio.to_thread(pipe.recv)
                endpoint.revoke(question)
            await plain
            for raw in raws:
                raw.agent.close()

    asyncio.run(run())


def cpu(pid: int | None = None) -> float:
    """Seconds of processor that this process, or another, has used."""
    if pid is None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def compare(pipe: Connection, rounds: int, count: int) -> dict[str, list[float]]:
    """Run every contender in turn; seconds of each round."""
    facts = pipe.recv()
    order, offer = facts["order"], facts["offer"]
    local = random.Random(3).sample(range(POOL_BLOCKS), count)
    pool = make_pool(fill=False)
    seconds: dict[str, list[float]] = {}
    plain = socket.create_connection(("127.0.0.1", facts["port"]))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def plain_read() -> None:
        plain.sendall(b"READ")
        for (view,) in (pool.slices([block], pool.whole) for block in local):
            got = 0
            while got < len(view):
                got += plain.recv_into(view[got:])

    async def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        outcome = work()
        if asyncio.iscoroutine(outcome):
            await outcome
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        for number, block in enumerate(local):
            view = pool.views[0][block * LAYOUT.block_bytes :]
            assert view[0] == order[number] % 256, f"{name}: block {number} has other content"
            view[0] = (view[0] + 1) % 256

    tcp = await KvEndpoint.open(
        pool, worker_id="tcp", secret=SECRET, settings=TransferSettings(transport=Transport.TCP)
    )
    async with tcp:
        ours = {"ours, tcp": tcp}
        raws: dict[str, RawNixl] = {}
        if have_nixl():
            ours["ours, nixl"] = await KvEndpoint.open(pool, worker_id="nixl", secret=SECRET)
            raws = {
                "raw nixl (cma)": RawNixl("raw-cma", pool, ""),
                "raw nixl (tcp)": RawNixl("raw-tcp", pool, "TLS=tcp"),
            }
            for raw, metadata in zip(raws.values(), facts["raw"], strict=True):
                raw.connect(metadata, facts["spans"])
        for name, endpoint in ours.items():
            print(f"{name}: {endpoint.route(offer).transport} ({endpoint.route(offer).reason})")

        def read_of(endpoint: KvEndpoint) -> Callable[[], Any]:
            return lambda: endpoint.read(
                offer, "bench", order, local, deadline=Deadline.after(30), proof=facts["proof"]
            )

        contenders: list[tuple[str, Callable[[], Any]]] = [("plain socket", plain_read)]
        contenders += [(name, lambda raw=raw: raw.read(order, local)) for name, raw in raws.items()]  # type: ignore[misc]
        contenders += [(name, read_of(endpoint)) for name, endpoint in ours.items()]
        for number in range(rounds + 2):
            for name, work in contenders:
                await timed(name, work)
            if number == 1:
                seconds.clear()
            random.shuffle(contenders)
        await bookkeeping(tcp, local)
        for name, endpoint in ours.items():
            await overhead(pipe, facts["pid"], name, endpoint, local[:1])
        for raw in raws.values():
            raw.agent.close()
        for name, endpoint in ours.items():
            if name != "ours, tcp":
                await endpoint.close()
    plain.close()
    pipe.send(None)
    return seconds


async def bookkeeping(endpoint: KvEndpoint, blocks: list[int]) -> None:
    """Processor time of the contract alone: grant, describe, encode, decode, revoke, free; no byte moves."""
    requests = 500
    before = cpu()
    for number in range(requests):
        session = f"contract-{number}"
        shard = await export_blocks(endpoint, session, blocks, Access.READ, 30)
        data = msgspec.msgpack.encode(CanonicalKv(session, len(blocks) * LAYOUT.block_size, (shard,)))
        kv = msgspec.msgpack.decode(data, type=CanonicalKv)
        endpoint.route(kv.shards[0].offer)
        endpoint.inflight.hold(kv.shards[0].blocks).release()
        endpoint.revoke(session)
        endpoint.free_when_idle(blocks, len)
    print(f"CPU of the contract alone, {len(blocks)} blocks: {(cpu() - before) / requests * 1e6:.0f} us")


async def overhead(pipe: Connection, pid: int, name: str, endpoint: KvEndpoint, blocks: list[int]) -> None:
    """Processor time of one request that moves one block, both processes, without the pipe that drives them."""

    def exchange(session: str) -> bytes:
        pipe.send(session)
        return pipe.recv()  # type: ignore[no-any-return]

    requests = 400

    async def run(transfer: bool) -> tuple[float, float]:
        mine, theirs = cpu(), cpu(pid)
        for number in range(requests):
            data = exchange(f"{name}-{transfer}-{number}")
            if transfer:
                kv = msgspec.msgpack.decode(data, type=CanonicalKv)
                await import_blocks(endpoint, kv, blocks, deadline=Deadline.after(30))
                endpoint.check_integrity()
            pipe.send("done")
        return (cpu() - mine) / requests, (cpu(pid) - theirs) / requests

    await run(transfer=True)
    with_, without = await run(transfer=True), await run(transfer=False)
    mine, theirs = (max(0.0, one - other) * 1e6 for one, other in zip(with_, without, strict=True))
    print(f"{name}: CPU of a request for one block: {mine:.0f} us here, {theirs:.0f} us at the holder")


def report(seconds: dict[str, list[float]], count: int) -> None:
    """Print the table and the ratios that matter."""
    size = count * LAYOUT.block_bytes
    best = {name: size / min(times) / 1e9 for name, times in seconds.items()}
    print(f"\n| {count} blocks of 64 KiB | best GB/s | median GB/s |\n|---|---|---|")
    for name, times in sorted(seconds.items(), key=lambda item: min(item[1])):
        print(f"| {name} | {best[name]:.2f} | {size / statistics.median(times) / 1e9:.2f} |")
    print("\n| ratio of speeds | best rounds | median of the rounds' ratios | wanted |\n|---|---|---|---|")
    for one, other, wanted in (
        ("ours, nixl", "raw nixl (cma)", 0.9),
        ("ours, tcp", "plain socket", 0.9),
        ("ours, tcp", "raw nixl (tcp)", 2.0),
    ):
        if one in best and other in best:
            rounds = statistics.median(theirs / mine for mine, theirs in zip(seconds[one], seconds[other], strict=True))
            print(f"| {one} / {other} | {best[one] / best[other]:.2f} | {rounds:.2f} | {wanted} |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=512)
    options = parser.parse_args()
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=holder, args=(there, options.blocks), daemon=True)
    process.start()
    seconds = asyncio.run(compare(here, options.rounds, options.blocks))
    process.join(30)
    report(seconds, options.blocks)
    sys.exit(process.exitcode or 0)


if __name__ == "__main__":
    main()
