"""The engine's configuration: the framework's names with this engine's defaults, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass

from core.messages import ConfigError, EngineConfig

BLOCK_SIZE = 16
MAX_NUM_SEQS = 64
BATCHED_TOKENS_CPU = 512
BATCHED_TOKENS_CUDA = 4096
KV_LAYOUTS = ("NHD", "HND")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EngineArgs:
    """What `engine-args` takes here."""

    threads: int | None = None
    """Threads that a step computes on; None is all processors but one, which is left to the event loop."""

    kv_layout: str = "NHD"
    """What lies outermost in a KV block: tokens ("NHD") or heads ("HND"). Workers that exchange KV may differ."""
    kv_shards: int = 1
    """Tensor-parallel ranks as which the KV is shown to other workers, each with a part of the heads; needs "HND"."""

    @classmethod
    def parse(cls, config: EngineConfig) -> EngineArgs:
        """Raises `ConfigError` for a key that is not known, or a value that cannot be."""
        config.check_engine_args(cls.__dataclass_fields__)
        threads = config.engine_args.get("threads")
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
            raise ConfigError(f"engine-args: threads is {threads!r}; it must be a whole number of at least 1.")
        layout, shards = config.engine_args.get("kv_layout", "NHD"), config.engine_args.get("kv_shards", 1)
        if layout not in KV_LAYOUTS:
            raise ConfigError(f"engine-args: kv_layout is {layout!r}; it must be one of {', '.join(KV_LAYOUTS)}.")
        if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
            raise ConfigError(f"engine-args: kv_shards is {shards!r}; it must be a whole number of at least 1.")
        if shards > 1 and layout != "HND":
            raise ConfigError(f"engine-args: kv_shards is {shards}, for which kv_layout must be HND; it is {layout}.")
        return cls(threads, layout, shards)


@dataclass(frozen=True, slots=True)
class Settings:
    """One worker's configuration with every default filled in, except what depends on the model and on free memory."""

    config: EngineConfig
    args: EngineArgs
    device: str
    """As torch writes it: "cpu", "cuda:0"."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    @property
    def threads(self) -> int:
        """Threads that a step computes on. `OMP_NUM_THREADS` sets them too."""
        stated = os.environ.get("OMP_NUM_THREADS", "")
        return self.args.threads or (int(stated) if stated.isdigit() else max(1, len(os.sched_getaffinity(0)) - 1))

    @classmethod
    def resolve(cls, config: EngineConfig) -> Settings:
        """Raises `ConfigError` for values that cannot work."""
        args = EngineArgs.parse(config)
        device = _device(config.device)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_kv_blocks"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', '-')} is {value}; it must be at least 1.")
        fraction = config.gpu_memory_utilization
        if fraction is not None and not 0 < fraction <= 1:
            raise ConfigError(f"gpu-memory-utilization is {fraction}; it must be above 0 and at most 1.")
        if config.dtype not in DTYPES:
            raise ConfigError(f"dtype is '{config.dtype}'; it must be one of {', '.join(DTYPES)}.")
        batched = config.max_num_batched_tokens
        if batched is None:
            batched = BATCHED_TOKENS_CPU if device == "cpu" else BATCHED_TOKENS_CUDA
            batched = max(batched, config.max_num_seqs or 0)
        seqs = config.max_num_seqs
        if seqs is None:
            seqs = min(MAX_NUM_SEQS, batched)
        elif seqs > batched:
            raise ConfigError(
                f"max-num-seqs is {seqs} and max-num-batched-tokens {batched}: a step could not give every running "
                f"sequence its next token; raise max-num-batched-tokens to {seqs} or more, or lower max-num-seqs."
            )
        return cls(config, args, device, config.block_size or BLOCK_SIZE, seqs, batched)


def _device(wanted: str | None) -> str:
    import torch

    count = torch.cuda.device_count()
    if wanted is None:
        return "cuda:0" if count else "cpu"
    kind, _, number = wanted.partition(":")
    if kind == "cpu" and not number:
        return "cpu"
    if kind != "cuda" or (number and not number.isdigit()):
        raise ConfigError(f"device is '{wanted}'; the torch engine runs on 'cpu', 'cuda' or 'cuda:N'.")
    index = int(number or 0)
    if index >= count:
        found = f"{count} CUDA device(s) are visible" if count else "no CUDA device is visible to torch"
        raise ConfigError(
            f"device is '{wanted}', but {found}: set device to 'cpu', or install a driver and CUDA torch."
        )
    return f"cuda:{index}"
