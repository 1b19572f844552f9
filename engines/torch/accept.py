"""Checks a request and makes the sequence that the engine thread runs."""

from __future__ import annotations

import asyncio
import itertools
import random

from core.messages import EngineInfo, EngineRequest, RequestRejected
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
        self._compiler = Compiler(settings, info.vocab_size, info.eos_token_ids)
        self._arrivals = itertools.count()
        self._seeds = random.Random(settings.config.seed)

    def check(self, request: EngineRequest) -> None:
        """Raises `RequestRejected` for what cannot be served here."""
        info, tokens = self._info, request.token_ids
        if not tokens:
            raise RequestRejected("The prompt is empty: it needs at least one token.")
        if len(tokens) >= info.max_model_len:
            raise RequestRejected(
                f"The prompt has {len(tokens)} tokens, and a sequence here has at most {info.max_model_len}, one "
                f"of them generated: shorten it to {info.max_model_len - 1} tokens or fewer.",
                code="context_length_exceeded",
            )
        if (wrong := next((t for t in (min(tokens), max(tokens)) if not 0 <= t < info.vocab_size), None)) is not None:
            raise RequestRejected(f"Token id {wrong} is outside the vocabulary of {info.vocab_size} tokens.")
        if request.stop.max_tokens < 1:
            raise RequestRejected(
                f"max_tokens is {request.stop.max_tokens}; it must be at least 1.", param="max_tokens"
            )
        if not 0 <= request.prior_tokens < len(tokens):
            raise RequestRejected(f"prior_tokens is {request.prior_tokens}; it must be from 0 to {len(tokens) - 1}.")
        for token in request.sampling.logit_bias:
            if not 0 <= token < info.vocab_size:
                raise RequestRejected(
                    f"logit_bias names token {token}, outside the vocabulary of {info.vocab_size} tokens.",
                    param="logit_bias",
                )
        if request.lora is not None:
            raise RequestRejected(
                f"LoRA '{request.lora}' is not loaded: the torch engine serves no LoRA.", param="model"
            )
        if request.data_parallel_rank not in (None, 0):
            raise RequestRejected(
                f"Data-parallel rank {request.data_parallel_rank} does not exist: there is rank 0 alone."
            )

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
