"""Makes a request into the sequence that the engine thread runs."""

from __future__ import annotations

import asyncio
import itertools
import random

from core.messages import EngineInfo, EngineRequest
from engines.torch.constraint import Compiler
from engines.torch.sampling_state import SamplingState
from engines.torch.sequence import Sequence
from engines.torch.settings import Settings

LONG_PROMPT = 4096
"""Prompt tokens from which a request is prepared off the event loop."""


class Acceptor:
    """Turns requests into sequences. Lives on the event loop; what takes time it does in a thread."""

    def __init__(self, settings: Settings, info: EngineInfo) -> None:
        self._info = info
        self._compiler = Compiler(settings.config, info.vocab_size, info.eos_token_ids)
        self._arrivals = itertools.count()
        self._seeds = random.Random(settings.config.seed)

    async def sequence(self, request: EngineRequest) -> Sequence:
        """The request's sequence. Raises `RequestRejected` when its constraint does not compile."""
        arrival, seed = next(self._arrivals), self._seeds.getrandbits(64)
        if request.constraint is None and len(request.token_ids) < LONG_PROMPT:
            return self._make(request, arrival, seed)
        return await asyncio.to_thread(self._make, request, arrival, seed)

    def _make(self, request: EngineRequest, arrival: int, seed: int) -> Sequence:
        info = self._info
        constrainer = None
        if request.constraint is not None:
            prior = request.token_ids[len(request.token_ids) - request.prior_tokens :]
            constrainer = self._compiler.constrainer(request.constraint, prior)
        sampling = SamplingState(
            request, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids, device=info.device, seed=seed
        )
        return Sequence(
            request, arrival=arrival, sampling=sampling, constrainer=constrainer, max_len=info.max_model_len
        )
