"""Builds a running engine from a configuration: everything that happens once, on the engine thread."""

from __future__ import annotations

import torch

from core.messages import ConfigError, EngineInfo
from engines.torch.block_pool import BlockPool
from engines.torch.constraint import Masker
from engines.torch.kv_cache import PagedCache, block_bytes, count_blocks
from engines.torch.kv_memory import fingerprint_of, layouts_of, pool_of
from engines.torch.loader import load
from engines.torch.model import Runner
from engines.torch.sampler import Sampler
from engines.torch.scheduler import Scheduler
from engines.torch.settings import Settings
from engines.torch.stepper import Stepper
from engines.torch.thread import Started

PROMPT_LOGITS = 32 << 20
"""Most logits that a step computes of one prompt whose log-probabilities were asked for: 128 MB in float32."""


def start(settings: Settings) -> Started:
    """Loads the model and allocates its KV cache. Raises `ConfigError`."""
    torch.set_num_threads(settings.threads)
    try:
        loaded = load(settings)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{settings.config.model} does not fit the memory of {settings.device}: choose a smaller model, a dtype of "
            "fewer bytes, or another device."
        ) from error
    model, dtype = loaded.model, loaded.model.dtype
    per_block = block_bytes(loaded.layers, settings.block_size, dtype)
    num_blocks, max_model_len = count_blocks(settings, per_block, loaded.max_model_len)
    try:
        cache = PagedCache(
            loaded.layers, num_blocks, settings.block_size, dtype, settings.device, settings.args.kv_layout
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"The KV cache of {num_blocks} blocks needs {num_blocks * per_block / 1e9:.1f} GB, more than there is: "
            "lower num-kv-blocks, kv-cache-memory, gpu-memory-utilization or max-model-len."
        ) from error
    layouts = layouts_of(loaded.layers, settings, dtype)
    runner = Runner(model, cache, settings.device)
    pool = BlockPool(num_blocks, settings.block_size, caching=settings.config.enable_prefix_caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        prompt_logprobs_chunk=max(1, PROMPT_LOGITS // runner.vocab_size),
    )
    sampler = Sampler(Masker(runner.vocab_size, settings.threads))
    info = EngineInfo(
        vocab_size=runner.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=loaded.eos_token_ids,
        block_size=settings.block_size,
        num_kv_blocks=num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        device=settings.device,
        dtype=str(dtype).removeprefix("torch."),
        kv_fingerprint=fingerprint_of(layouts, settings.config),
    )
    pools = [pool_of(layout, cache, settings.device) for layout in layouts]
    return Started(info, Stepper(runner, scheduler, sampler), pools)
