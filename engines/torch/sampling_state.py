"""What the sampler keeps of one request: its parameters made ready for tensors, and counts of what was generated."""

from __future__ import annotations

import struct

import numpy as np
import torch
import xxhash
from torch import Tensor

from core.messages import EngineRequest

MIN_TEMPERATURE = 1e-5
"""Below this a temperature is greedy: its reciprocal would overflow the logits' range."""


class SamplingState:
    """Made when a request is accepted, off the engine thread; afterwards the engine thread's own."""

    def __init__(
        self, request: EngineRequest, *, vocab_size: int, eos_token_ids: tuple[int, ...], device: str, seed: int
    ) -> None:
        """`seed` is used when the request has none."""
        params, stop = request.sampling, request.stop
        self.params = params
        self.seed = params.seed if params.seed is not None else seed
        self.greedy = params.temperature < MIN_TEMPERATURE or params.top_k == 1
        self.truncates = params.top_k > 0 or params.top_p < 1
        self.stop_ids = frozenset(stop.stop_token_ids) | (frozenset() if stop.ignore_eos else frozenset(eos_token_ids))
        """Tokens that end the sequence."""
        self.min_tokens = stop.min_tokens
        self.early_stops = torch.tensor(
            [i for i in self.stop_ids if 0 <= i < vocab_size], dtype=torch.int64, device=device
        )
        self.bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
            self.bias = ids, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self.counts: Tensor | None = None
        """[V] how often each token was generated; None when no penalty needs it."""
        self.seen: Tensor | None = None
        """[V] whether each token is in the prompt or was generated; None without a repetition penalty."""
        prior = len(request.token_ids) - request.prior_tokens
        # numpy, because a large torch operation here would leave this thread with compute threads of its own.
        if params.presence_penalty or params.frequency_penalty:
            generated = np.bincount(np.array(request.token_ids[prior:], np.int64), minlength=vocab_size)
            self.counts = torch.from_numpy(generated.astype(np.float32)).to(device)
        if params.repetition_penalty != 1:
            seen = np.zeros(vocab_size, np.bool_)
            seen[request.token_ids] = True
            self.seen = torch.from_numpy(seen).to(device)
        self.plain = (
            self.bias is None
            and self.counts is None
            and self.seen is None
            and request.constraint is None
            and not params.bad_token_sequences
        )
        """Whether the logits are used as they are, once `min_tokens` is reached."""

    def edits(self, position: int) -> bool:
        """Whether anything changes the logits of the output token at `position` (0 is the first)."""
        return not self.plain or (position < self.min_tokens and len(self.early_stops) > 0)

    def banned(self, token_ids: list[int], generated: int) -> list[int]:
        """Tokens that would complete a forbidden sequence now."""
        start = len(token_ids) - generated
        return [
            bad[-1]
            for bad in self.params.bad_token_sequences
            if bad
            and len(bad) - 1 <= generated
            and token_ids[max(start, len(token_ids) - len(bad) + 1) :] == list(bad[:-1])
        ]

    def record(self, token: int) -> None:
        """Counts a generated token."""
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) for the output token at `position`: by seed and position alone.

        It has 23 bits, so that in float32 its product with a sum stays below the sum.
        """
        return (xxhash.xxh3_64_intdigest(struct.pack("<qq", _int64(self.seed), position)) >> 41) / (1 << 23)


def _int64(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
