"""The KV cache as the core sees it: its layout, its fingerprint, and memory that peers can read and write."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from core.kv.fingerprint import build_fingerprint, identify_model, rope_text
from core.kv.layout import ITEM_SIZES, KvLayout
from core.kv.transfer import KvPool, KvRegion, MemoryKind
from core.messages import ConfigError, EngineConfig
from engines.torch.kv_cache import LayerSpec, PagedCache
from engines.torch.settings import Settings

_COPY_DEFAULT = 4
"""cudaMemcpyDefault: the addresses say which memory they are in."""


def layouts_of(specs: list[LayerSpec], settings: Settings, dtype: torch.dtype) -> list[KvLayout]:
    """The cache's layout, rank by rank as it is shown to others. Empty when the core has no words for it, because
    layers, or keys and values, differ in shape. Raises `ConfigError` when the heads cannot be shared so.
    """
    first = specs[0]
    alike = all((spec.kv_heads, spec.key_size, spec.value_size) == _shape(first) for spec in specs)
    name = str(dtype).removeprefix("torch.")
    if not alike or first.key_size != first.value_size or name not in ITEM_SIZES:
        return []
    args = settings.args
    try:
        return [
            KvLayout(
                layers=len(specs),
                kv_heads=first.kv_heads,
                head_size=first.key_size,
                block_size=settings.block_size,
                dtype=name,
                dims=args.kv_layout,
                tp_size=args.kv_shards,
                tp_rank=rank,
            )
            for rank in range(args.kv_shards)
        ]
    except ValueError as error:
        raise ConfigError(f"engine-args: kv_shards is {args.kv_shards}, which does not work here: {error}.") from error


def fingerprint_of(layouts: list[KvLayout], config: EngineConfig) -> dict[str, str]:
    """What must be equal on both sides of a transfer; empty for a cache that cannot be moved."""
    if not layouts:
        return {}
    folder = Path(config.model)
    return build_fingerprint(
        layouts[0],
        model=identify_model(folder),
        rope=rope_text(json.loads((folder / "config.json").read_text())),
        engine="torch",
        engine_version=str(torch.__version__),
        extra={"byte_order": sys.byteorder},
    )


def pool_of(layout: KvLayout, cache: PagedCache, device: str) -> KvPool:
    """One rank's part of the cache's memory. The pool keeps it alive."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    regions = [
        # A rank's heads lie together where heads come first; otherwise there is one rank, which has them all.
        KvRegion(
            tensor.data_ptr() + layout.heads.start * tensor.stride(2) * tensor.itemsize,
            tensor.stride(0) * tensor.itemsize,
        )
        for tensor in tensors
    ]
    if device == "cpu":
        return KvPool(layout, regions, cache.num_blocks, owner=cache)
    index = torch.device(device).index

    def enter() -> None:
        torch.cuda.set_device(index)

    return KvPool(
        layout,
        regions,
        cache.num_blocks,
        owner=cache,
        memory=MemoryKind.VRAM,
        device=index,
        copier=_cuda_copier(enter),
        enter_thread=enter,
    )


def _cuda_copier(enter: Callable[[], None]) -> Callable[[Sequence[tuple[int, int, int]]], None]:
    runtime = _cuda_runtime()
    copy = runtime.cudaMemcpyAsync
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def copier(ranges: Sequence[tuple[int, int, int]]) -> None:
        enter()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for source, target, length in ranges:
            if status := copy(target, source, length, _COPY_DEFAULT, stream.cuda_stream):
                raise RuntimeError(f"CUDA could not copy {length} bytes of KV: cudaMemcpyAsync gave error {status}")
        stream.synchronize()

    return copier


def _cuda_runtime() -> ctypes.CDLL:
    """The runtime library that torch has loaded; another copy would have contexts of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.rpartition(" ")[2]
        if "libcudart" in name:
            return ctypes.CDLL(name)
    raise RuntimeError("torch runs on CUDA and no libcudart is loaded; its build is one that this engine does not know")


def _shape(spec: LayerSpec) -> tuple[int, int, int]:
    return spec.kv_heads, spec.key_size, spec.value_size
