"""Two torch engines between which KV moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from core.engine import EngineHost, EngineRegistry, Source
from core.messages import EngineConfig, EngineRequest, Role, SamplingParams, StopConditions
from dynamo.testing.pair import Pair
from dynamo.testing.target import Target
from engines.torch import TorchEngine

GREEDY = SamplingParams(temperature=0)


def make_target(folder: Path, role: Role, **config: Any) -> Target:
    """An engine, not started; 64 blocks of 16 tokens, checksums on, within the process, unless said otherwise."""
    fields: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64, "max_model_len": 512}
    fields |= {"kv_checksum": True, "kv_transfer": "memory", "worker_id": f"{role}-0"} | config
    fields["engine_args"] = {"threads": 1} | config.get("engine_args", {})
    adapter = EngineRegistry([]).add(TorchEngine, Source("torch", "tests"))
    host = EngineHost(adapter, EngineConfig(model=str(folder), **fields), role)
    return Target(host, step_timeout=20.0, start_timeout=60.0)


@asynccontextmanager
async def pair_of(
    folder: Path, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **both: Any
) -> AsyncIterator[Pair]:
    """A started pair; at the end, if nothing failed, both engines must have let go of everything."""
    targets = (
        make_target(folder, Role.PREFILL, **both | (prefill or {})),
        make_target(folder, Role.DECODE, **both | (decode or {})),
    )
    async with Pair(*targets) as pair:
        yield pair
        await pair.until_released()


def engine_of(target: Target) -> TorchEngine:
    """The adapter itself."""
    assert isinstance(target.host.instance, TorchEngine)
    return target.host.instance


def ask(prompt: list[int], count: int = 8, name: str = "r", **rest: Any) -> EngineRequest:
    """Exactly `count` greedy tokens."""
    rest.setdefault("sampling", GREEDY)
    stop = StopConditions(max_tokens=count, min_tokens=count)
    return EngineRequest(request_id=name, token_ids=prompt, stop=stop, **rest)
