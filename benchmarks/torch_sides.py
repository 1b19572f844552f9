"""The two sides of `benchmarks.torch_engine`, each for a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.engine import EngineHost, EngineRegistry, Source
from core.messages import EngineConfig, EngineRequest, Role, SamplingParams, StopConditions
from engines.torch import TorchEngine


def engine_side(connection: Connection, options: argparse.Namespace) -> None:
    """Answers with the engine, all prompts of a question at once, until the connection closes."""
    asyncio.run(_engine_side(connection, options))


async def _engine_side(connection: Connection, options: argparse.Namespace) -> None:
    args = {"threads": options.threads} if options.threads else {}
    config = EngineConfig(model=options.model, device=options.device, dtype=options.dtype, engine_args=args)
    adapter = EngineRegistry([]).add(TorchEngine, Source("torch", "benchmarks"))
    names = itertools.count()

    async with EngineHost(adapter, config, Role.AGGREGATED) as host:
        connection.send({"vocabulary": str(host.info.vocab_size), "dtype": host.info.dtype, "device": host.info.device})

        async def generate(prompt: list[int], output: int) -> None:
            request = EngineRequest(
                request_id=str(next(names)),
                token_ids=prompt,
                stop=StopConditions(max_tokens=output, ignore_eos=True),
                sampling=SamplingParams(temperature=0),
            )
            count = 0
            async for delta in host.decode(request):
                count += len(delta.token_ids)
            assert count == output, (count, output)

        while True:
            try:
                _, prompts, output = await asyncio.to_thread(connection.recv)
            except EOFError:
                return
            began = time.perf_counter()
            await asyncio.gather(*(generate(prompt, output) for prompt in prompts))
            connection.send(time.perf_counter() - began)


def transformers_side(connection: Connection, options: argparse.Namespace) -> None:
    """Answers with `generate`: "batch" all prompts at once, "loop" one after the other."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine does, see its __init__
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from engines.torch.loader import resolve_dtype
    from engines.torch.settings import EngineArgs, Settings

    settings = Settings.resolve(EngineConfig(model=options.model, device=options.device))
    threads = EngineArgs(options.threads).threads or settings.threads
    torch.set_num_threads(threads)
    dtype = resolve_dtype(options.dtype, AutoConfig.from_pretrained(options.model), settings.device)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.to(settings.device).eval()
    connection.send(
        {
            "model": Path(options.model).name,
            "threads": str(threads),
            "versions": f"torch {version('torch')}, transformers {version('transformers')}",
        }
    )

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output: int) -> None:
        ids = torch.tensor(prompts, device=settings.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output,
            min_new_tokens=output,
            do_sample=False,
            pad_token_id=0,
        )
        assert found.shape[1] == len(prompts[0]) + output
        found.cpu()

    while True:
        try:
            what, prompts, output = connection.recv()
        except EOFError:
            return
        began = time.perf_counter()
        for part in [prompts] if what == "batch" else [[prompt] for prompt in prompts]:
            generate(part, output)
        connection.send(time.perf_counter() - began)
