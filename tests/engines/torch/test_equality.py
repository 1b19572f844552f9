"""Greedy output equals `transformers.generate`, however the work is cut up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.messages import SamplingParams, StopConditions
from tests.engines.torch.conftest import FAMILIES, VOCAB, Engine, generate, prompt_of, save_model

LENGTHS = (1, 5, 15, 16, 17, 40, 90, 130)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_batch_of_mixed_lengths_equals_generate(
    family: str, model_of: Callable[[str], Path], reference: Callable[[str], Any], engine: Engine
) -> None:
    """Windows of 24 tokens are far shorter than most of these prompts."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [generate(reference(family), prompt, 24) for prompt in prompts]
    async with engine(model_of(family)) as running:
        assert await asyncio.gather(*(running.tokens(prompt, 24) for prompt in prompts)) == expected
        await running.idle()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize(("budget", "block_size"), [(7, 4), (33, 16), (100, 64)])
async def test_chunked_prefill_changes_nothing(
    family: str,
    budget: int,
    block_size: int,
    model_of: Callable[[str], Path],
    reference: Callable[[str], Any],
    engine: Engine,
) -> None:
    """Prompts cut into chunks that fit no block, computed beside decoding sequences."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate((3, 50, 75, 110, 9))]
    expected = [generate(reference(family), prompt, 12) for prompt in prompts]
    config = {"max_num_batched_tokens": budget, "block_size": block_size, "num_kv_blocks": 1024 // block_size}
    async with engine(model_of(family), **config) as running:
        assert await asyncio.gather(*(running.tokens(prompt, 12) for prompt in prompts)) == expected
        await running.idle()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
async def test_a_cached_prefix_changes_nothing(
    family: str, model_of: Callable[[str], Path], reference: Callable[[str], Any], engine: Engine
) -> None:
    """Whole, partly and not at all cached prompts, the fully cached one included: its last token is still computed."""
    prompt = prompt_of(96)
    others = [prompt, prompt[:64], prompt[:50], prompt[:70] + prompt_of(40, 1), prompt_of(20, 2)]
    async with engine(model_of(family)) as running:
        await running.tokens(prompt, 20)
        for other, cached in zip(others, (80, 48, 48, 64, 0), strict=True):
            deltas = await running.deltas(running.request(other, 20))
            assert deltas[0].cached_tokens == cached
            assert [t for d in deltas for t in d.token_ids] == generate(reference(family), other, 20)
        await running.idle()


@pytest.mark.parametrize("family", ["llama", "mistral"])
async def test_preemption_is_invisible(
    family: str, model_of: Callable[[str], Path], reference: Callable[[str], Any], engine: Engine
) -> None:
    """Eight sequences that need about three times the blocks there are; none is lost and none differs."""
    prompts = [prompt_of(20 + 3 * seed, seed) for seed in range(8)]
    expected = [generate(reference(family), prompt, 40) for prompt in prompts]
    async with engine(model_of(family), block_size=4, num_kv_blocks=40) as running:
        assert running.host.info.max_model_len == 160
        assert await asyncio.gather(*(running.tokens(prompt, 40) for prompt in prompts)) == expected
        assert running.engine.num_preemptions > 0
        await running.idle()


async def test_generated_blocks_are_reused_for_the_next_turn(
    model_of: Callable[[str], Path], reference: Callable[[str], Any], engine: Engine
) -> None:
    """A conversation's second turn finds the first answer's KV too."""
    prompt = prompt_of(30)
    async with engine(model_of("llama")) as running:
        answer = await running.tokens(prompt, 40)
        second = prompt + answer + prompt_of(5, 3)
        deltas = await running.deltas(running.request(second, 8))
        assert deltas[0].cached_tokens == 64  # 69 of the 70 tokens before have KV: four full blocks
        assert [t for d in deltas for t in d.token_ids] == generate(reference("llama"), second, 8)


async def test_sharded_weights_load(tmp_path: Path, reference: Callable[[str], Any], engine: Engine) -> None:
    """A checkpoint in several files with an index."""
    folder = save_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    async with engine(folder) as running:
        assert await running.tokens(prompt_of(20), 12) == generate(reference("llama"), prompt_of(20), 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_dtype_is_what_was_asked_for(tmp_path: Path, dtype: str, engine: Engine) -> None:
    """A checkpoint runs in the dtype named, and the first token is the one transformers finds in it."""
    folder = save_model(tmp_path / dtype, "llama", dtype=getattr(torch, dtype))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    async with engine(folder, dtype=dtype) as running:
        assert running.host.info.dtype == dtype
        assert await running.tokens(prompt_of(20), 1) == generate(model, prompt_of(20), 1)


async def test_auto_dtype_is_the_checkpoints_where_the_processor_has_it(tmp_path: Path, engine: Engine) -> None:
    """A float32 checkpoint is float32; a bfloat16 one is never silently anything but bfloat16 or float32."""
    for dtype, allowed in ((torch.float32, {"float32"}), (torch.bfloat16, {"bfloat16", "float32"})):
        folder = save_model(tmp_path / str(dtype), "llama", dtype=dtype)
        async with engine(folder, dtype="auto") as running:
            assert running.host.info.dtype in allowed


async def test_seeded_sampling_does_not_depend_on_batch_mates(model_of: Callable[[str], Path], engine: Engine) -> None:
    """The same seeded request, alone and among others with other parameters, gives the same tokens."""
    sampling = SamplingParams(temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, seed=11, frequency_penalty=0.3)
    prompt = prompt_of(30)
    mates = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=s)
        for t, k, p, s in ((0, 0, 1, None), (2, 0, 1, 3), (0.7, 5, 1, 11), (1, 0, 0.5, None))
    ]
    async with engine(model_of("llama"), max_num_batched_tokens=50) as running:
        alone = await running.tokens(prompt, 20, sampling)
        jobs = [running.tokens(prompt_of(10 + 9 * i, i), 25, mate) for i, mate in enumerate(mates)]
        among, *_ = await asyncio.gather(running.tokens(prompt, 20, sampling, cache_salt="x"), *jobs)
        assert among == alone
        assert await running.tokens(prompt, 20, SamplingParams(temperature=1.3, seed=12)) != alone
        assert max(alone) < VOCAB


async def test_a_resumed_sequence_goes_on_as_if_never_interrupted(
    model_of: Callable[[str], Path], engine: Engine
) -> None:
    """`prior_tokens` count as output for the seed's position, penalties and min_tokens."""
    sampling = SamplingParams(temperature=1.0, seed=5, presence_penalty=0.7, repetition_penalty=1.2)
    prompt = prompt_of(25)
    async with engine(model_of("llama")) as running:
        whole = await running.tokens(prompt, 20, sampling)
        stop = StopConditions(max_tokens=12, min_tokens=20)
        resumed = await running.tokens(prompt + whole[:8], sampling=sampling, stop=stop, prior_tokens=8)
        assert resumed == whole[8:]
