"""KV in device memory: moved through the host, or by NIXL, between GPU and GPU and between GPU and CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.torch.conftest import prompt_of
from tests.engines.torch.kv_pairs import ask, pair_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HEADS_FIRST = {"block_size": 8, "engine_args": {"kv_layout": "HND", "kv_shards": 2}}


@pytest.mark.parametrize("transport", ["memory", "tcp", "nixl"])
@pytest.mark.parametrize("shape", [{}, HEADS_FIRST], ids=["same layout", "other layout"])
@pytest.mark.parametrize("sides", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
async def test_same_tokens(transport: str, shape: dict[str, Any], sides: tuple[str, str], llama: Path) -> None:
    """Pulled, and pushed while the prompt is computed."""
    if transport == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("nixl is not installed")
    prompt = prompt_of(150)
    prefill = {"device": sides[0], "max_num_batched_tokens": 32, "max_num_seqs": 4}
    async with pair_of(llama, prefill, {"device": sides[1]} | shape, kv_transfer=transport) as pair:
        expected = (await pair.prefill.complete(ask(prompt, 12))).tokens
        for kind in pair.kinds:
            run = await pair.hand_over(ask(prompt, 12, cache_salt=kind), kind)
            assert run.tokens == expected, kind
