"""The same engine on a GPU, where there is one: the same tokens as transformers finds on the CPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.messages import Constraint, ConstraintKind, SamplingParams
from tests.engines.torch.conftest import FAMILIES, Engine, generate, prompt_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_batch_of_mixed_lengths_equals_generate(
    family: str, model_of: Callable[[str], Path], reference: Callable[[str], Any], engine: Engine
) -> None:
    """Chunked, cached, and with windows shorter than the prompts."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 5, 16, 17, 40, 90, 130))]
    expected = [generate(reference(family), prompt, 24) for prompt in prompts]
    async with engine(model_of(family), device="cuda", max_num_batched_tokens=100) as running:
        assert running.host.info.device == "cuda:0"
        for _ in range(2):
            assert await asyncio.gather(*(running.tokens(prompt, 24) for prompt in prompts)) == expected
        await running.idle()


async def test_sampling_constraints_and_preemption(llama: Path, engine: Engine) -> None:
    """Every part of the sampler runs on the device, and a seed means the same alone and in a batch."""
    sampling = SamplingParams(
        temperature=1.2,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        seed=3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={9: 2.0},
        bad_token_sequences=((5, 6), (7,)),
    )
    constraint = Constraint(ConstraintKind.REGEX, "[a-z]{30}")
    async with engine(llama, device="cuda", block_size=4, num_kv_blocks=40) as running:
        alone = await running.tokens(prompt_of(30), 30, sampling)
        jobs = [running.tokens(prompt_of(20 + i, i), 60, sampling) for i in range(6)]
        among, constrained, *_ = await asyncio.gather(
            running.tokens(prompt_of(30), 30, sampling, cache_salt="x", logprobs=3, prompt_logprobs=1),
            running.tokens(prompt_of(9), 60, SamplingParams(seed=1), constraint=constraint),
            *jobs,
        )
        assert among == alone
        assert 0 < len(constrained) <= 30
        assert running.engine.num_preemptions > 0
        await running.idle()


async def test_memory_follows_gpu_memory_utilization(llama: Path, engine: Engine) -> None:
    """A larger share gives more blocks, until full sequences can use no more."""
    found = []
    for share in (0.2, 0.4):
        config = {"num_kv_blocks": None, "gpu_memory_utilization": share, "max_num_seqs": 4096}
        async with engine(llama, device="cuda", max_num_batched_tokens=4096, **config) as running:
            found.append(running.host.info.num_kv_blocks)
    assert found[0] <= found[1] <= 4096 * 64
