"""The memory of the KV cache: one tensor of keys and one of values a layer, cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.messages import ConfigError
from engines.torch.settings import Settings

CPU_SHARE = 0.25
CPU_CEILING = 4 << 30
GPU_UTILIZATION = 0.9
GPU_HEADROOM = 512 << 20


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer keeps of a token, found by a probe of the model."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int | None
    """Tokens that a position attends to, itself included; None is all before it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's blocks: `keys` and `values` are [num_blocks, block_size, kv_heads, head size], in either order of
    memory (`PagedCache`).
    """

    keys: Tensor
    values: Tensor
    window: int | None


class PagedCache:
    """KV blocks of all layers. Block `i` of the pool is row `i` of every tensor."""

    def __init__(
        self,
        specs: list[LayerSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        dims: str = "NHD",
    ) -> None:
        """`dims`: what lies outermost in a block, tokens ("NHD") or heads ("HND").

        Contents start as zeros: whatever a mask hides is multiplied by zero, and must be a number.
        """

        def blocks(heads: int, size: int) -> Tensor:
            if dims == "NHD":
                return _zeros((num_blocks, block_size, heads, size), dtype, device)
            return _zeros((num_blocks, heads, block_size, size), dtype, device).transpose(1, 2)

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [
            Layer(
                blocks(spec.kv_heads, spec.key_size),
                blocks(spec.kv_heads, spec.value_size),
                spec.window,
            )
            for spec in specs
        ]
        self.windows = sorted({spec.window for spec in specs}, key=lambda window: window or 0)


def block_bytes(specs: list[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(spec.kv_heads * (spec.key_size + spec.value_size) for spec in specs) * block_size * dtype.itemsize


def count_blocks(settings: Settings, per_block: int, max_model_len: int) -> tuple[int, int]:
    """How many blocks to allocate, and the longest sequence that they allow, at most `max_model_len`.

    Memory is taken, first match wins, from `num_kv_blocks`, `kv_cache_memory`, or the device: on a GPU what
    `gpu_memory_utilization` leaves beside the weights, on a CPU a quarter of the available memory up to 4 GiB; from
    the device never more than `max_num_seqs` sequences of full length can fill.

    Raises: `ConfigError` when not even one block fits, or a stated `max_model_len` does not.
    """
    config, size = settings.config, settings.block_size
    if config.num_kv_blocks is not None:
        blocks, source = config.num_kv_blocks, "num-kv-blocks"
    elif config.kv_cache_memory is not None:
        blocks, source = config.kv_cache_memory // per_block, "kv-cache-memory"
    else:
        memory, source = _device_memory(settings)
        blocks = min(memory // per_block, settings.max_num_seqs * -(-max_model_len // size))
    if blocks < 1:
        raise ConfigError(
            f"No memory for the KV cache: one block of {size} tokens takes {per_block / 1e6:.1f} MB, more than "
            f"{source} leaves; raise it, lower block-size, or choose a smaller model or dtype."
        )
    if config.max_model_len is not None and blocks * size < max_model_len:
        raise ConfigError(
            f"The KV cache of {blocks} blocks of {size} tokens holds {blocks * size} tokens, fewer than one sequence "
            f"of max-model-len {max_model_len}: lower max-model-len to {blocks * size}, or raise {source}."
        )
    return blocks, min(max_model_len, blocks * size)


def _device_memory(settings: Settings) -> tuple[int, str]:
    if settings.device == "cpu":
        return min(
            CPU_CEILING, int(_available_memory() * CPU_SHARE)
        ), "a quarter of the available memory (kv-cache-memory)"
    free, total = torch.cuda.mem_get_info(settings.device)
    fraction = settings.config.gpu_memory_utilization or GPU_UTILIZATION
    return int(free - (1 - fraction) * total - GPU_HEADROOM), f"gpu-memory-utilization {fraction}"


def _available_memory() -> int:
    """Bytes that can be had without swapping, the container's limit included."""
    available = int(_field(Path("/proc/meminfo"), "MemAvailable:")) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)


def _field(path: Path, name: str) -> str:
    return next(line.split()[1] for line in path.read_text().splitlines() if line.startswith(name))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from calloc: memory is committed as blocks are first written, not at start.
    raw = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)
