"""Blocks in device memory, on a real device: NIXL between two processes, and TCP through the pool's copier."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os

import pytest

from core.kv.layout import KvLayout
from core.kv.lease import Deadline
from core.kv.transfer import (
    Access,
    CanonicalKv,
    KvEndpoint,
    KvPool,
    KvRegion,
    MemoryKind,
    TransferSettings,
    Transport,
    export_blocks,
    import_blocks,
    push_blocks,
)

SECRET = b"the secret of the tests"
LAYOUT = KvLayout(layers=4, kv_heads=8, head_size=128, block_size=16, dtype="bfloat16")
OTHER = KvLayout(layers=4, kv_heads=8, head_size=128, block_size=32, dtype="bfloat16", dims="HND")
BLOCKS = 256
os.environ.update({"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"})


def have_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def device_pool(layout, seed=None):
    """A pool over one tensor a region, with a copier made of plain memory copies."""
    import torch

    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    runtime.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def copy(ranges):
        for source, target, length in ranges:
            assert runtime.cudaMemcpy(target, source, length, 4) == 0
        torch.cuda.synchronize()

    if seed is not None:
        torch.manual_seed(seed)
    make = torch.zeros if seed is None else (lambda *shape, **more: torch.randint(0, 256, shape, **more))
    tensors = [make(BLOCKS, layout.region_bytes, dtype=torch.uint8, device="cuda") for _ in range(layout.region_count)]
    torch.cuda.synchronize()
    regions = [KvRegion(tensor.data_ptr(), layout.region_bytes) for tensor in tensors]
    pool = KvPool(
        layout,
        regions,
        BLOCKS,
        owner=tensors,
        memory=MemoryKind.VRAM,
        copier=copy,
        enter_thread=lambda: torch.cuda.set_device(0),
    )
    return pool, tensors


def logical(layout, tensors, blocks):
    """[layer, part, head, token, byte] of the blocks' tokens."""
    import torch

    heads, size, vector = layout.kv_heads, layout.block_size, layout.vector_bytes
    out = []
    for tensor in tensors:
        chosen = tensor[blocks].cpu()
        if layout.dims == "NHD":
            out.append(chosen.view(-1, heads, vector).permute(1, 0, 2))
        else:
            out.append(chosen.view(len(blocks), heads, size, vector).permute(1, 0, 2, 3).reshape(heads, -1, vector))
    return torch.stack(out)


def holder(pipe, settings):
    async def run():
        pool, tensors = device_pool(LAYOUT, seed=1)
        async with await KvEndpoint.open(pool, worker_id="holder", secret=SECRET, settings=settings) as endpoint:
            blocks = list(range(100, 164))
            shard = await export_blocks(endpoint, "s", blocks, Access.READ, 120)
            room = await export_blocks(endpoint, "w", list(range(64)), Access.WRITE, 120)
            tokens = 64 * LAYOUT.block_size
            pipe.send((CanonicalKv("s", tokens, (shard,)), CanonicalKv("w", tokens, (room,))))
            pipe.send(logical(LAYOUT, tensors, blocks).numpy())
            await asyncio.to_thread(pipe.recv)
            pipe.send(logical(LAYOUT, tensors, list(range(64))).numpy())
            await asyncio.to_thread(pipe.recv)

    asyncio.run(run())
    os._exit(0)


def round_trip(transport, layout, *, checksum=False):
    """Pull from a holder on the device into another process's device memory, push it back, compare both."""
    import numpy as np

    settings = TransferSettings(transport=transport, checksum=checksum)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=holder, args=(there, settings), daemon=True)
    process.start()

    async def run():
        pool, tensors = device_pool(layout)
        async with await KvEndpoint.open(pool, worker_id="reader", secret=SECRET, settings=settings) as endpoint:
            assert here.poll(120)
            kv, room = here.recv()
            expected = here.recv()
            local = list(range(200, 200 + 64 * LAYOUT.block_size // layout.block_size))[::-1]
            local = [block % BLOCKS for block in local]
            for _ in range(3):
                (report,) = await import_blocks(endpoint, kv, local, deadline=Deadline.after(60))
            assert np.array_equal(logical(layout, tensors, local).numpy(), expected)
            tokens = kv.num_tokens
            await push_blocks(endpoint, room, local, first_token=0, tokens=tokens, deadline=Deadline.after(60))
            here.send("pushed")
            assert here.poll(60)
            assert np.array_equal(here.recv(), expected)
            endpoint.check_integrity()
            return report

    try:
        return asyncio.run(run())
    finally:
        process.kill()
        process.join(10)


CASES = [
    (Transport.NIXL, LAYOUT, False),
    (Transport.NIXL, OTHER, False),
    (Transport.TCP, LAYOUT, True),
    (Transport.TCP, OTHER, True),
]


@pytest.mark.skipif(not have_device(), reason="no CUDA device here")
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("transport", "layout", "checksum"), CASES)
def test_device_blocks_travel(transport, layout, checksum):
    report = round_trip(transport, layout, checksum=checksum)
    assert report.transport is transport
