"""Chooses the next token of every sequence of a step, all at once.

Order, as `SamplingParams` documents it: logit bias, bans and the constraint; penalties; temperature; min-p, top-k,
top-p. A row depends on its own logits, parameters, seed and position, and on nothing else in the batch: a token is
drawn by inverting the cumulative distribution, in token order, at one number that seed and position determine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from core.messages import TokenLogprob
from engines.torch.constraint import Masker
from engines.torch.sampling_state import SamplingState
from engines.torch.sequence import Sequence

BANNED = -1e30
"""Logit of a banned token. Finite, so that where a constraint allows nothing but banned tokens one of them is taken."""
CANDIDATES = 1024
"""Likeliest tokens that top-k and top-p look at first; only a row that needs more is sorted whole."""


class Sampler:
    """Turns logits into tokens."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Rows[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each sequence, and its log-probability where asked for.

        `logits` [n, V] float32, one row a sequence; they are changed.
        """
        if not sequences:
            return [], []
        scored = [index for index, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
        logprobs = torch.log_softmax(logits[scored], dim=-1) if scored else None
        edited = [i for i, sequence in enumerate(sequences) if sequence.sampling.edits(sequence.num_generated)]
        if edited:
            self._edit(logits, edited, sequences)
        drawn = [index for index, sequence in enumerate(sequences) if not sequence.sampling.greedy]
        highest, tokens = logits.max(dim=-1)
        if not bool(highest.isfinite().all()):
            raise FloatingPointError(
                "the model's logits are not numbers: its weights are damaged or overflow in this dtype; "
                "try bfloat16 or float32"
            )
        if drawn:
            states = [sequences[index].sampling for index in drawn]
            places = [sequences[index].num_generated for index in drawn]
            rows = logits if len(drawn) == len(sequences) else logits[drawn]
            tokens[drawn] = _draw(rows, states, places)
        chosen: list[int] = tokens.tolist()
        described: list[TokenLogprob | None] = [None] * len(sequences)
        if logprobs is not None:
            tops = [sequences[index].request.logprobs or 0 for index in scored]
            found = describe(logprobs, tokens[scored], tops)
            for index, logprob in zip(scored, found, strict=True):
                described[index] = logprob
        for sequence, token in zip(sequences, chosen, strict=True):
            sequence.sampling.record(token)
        return chosen, described

    def _edit(self, logits: Tensor, edited: list[int], sequences: Rows[Sequence]) -> None:
        constrained = []
        for index in edited:
            sequence = sequences[index]
            state, row = sequence.sampling, logits[index]
            if state.bias is not None:
                row.index_add_(0, *state.bias)
            if sequence.num_generated < state.min_tokens:
                row[state.early_stops] = BANNED
            if state.params.bad_token_sequences:
                banned = state.banned(sequence.token_ids, sequence.num_generated)
                row[torch.tensor(banned, dtype=torch.int64, device=row.device)] = BANNED
            if sequence.constrainer is not None:
                constrained.append((index, sequence.constrainer))
        if constrained:
            self._masker.apply(logits, constrained)
        _penalize_repetition(
            logits, [index for index in edited if sequences[index].sampling.seen is not None], sequences
        )
        _penalize_presence(
            logits, [index for index in edited if sequences[index].sampling.counts is not None], sequences
        )


def describe(logprobs: Tensor, tokens: Tensor, tops: Rows[int]) -> list[TokenLogprob]:
    """Log-probability and rank of `tokens` [n] in `logprobs` [n, V], with as many likeliest tokens as `tops` says."""
    values = logprobs.gather(1, tokens[:, None])
    ranks = ((logprobs > values).sum(dim=-1) + 1).tolist()
    most = min(max(tops), logprobs.shape[1])
    best = logprobs.topk(most, dim=-1) if most else None
    best_ids = best.indices.tolist() if best is not None else [[]] * len(tops)
    best_values = best.values.tolist() if best is not None else [[]] * len(tops)
    return [
        TokenLogprob(token, value, rank, list(zip(ids[:top], scores[:top], strict=True)))
        for token, value, rank, ids, scores, top in zip(
            tokens.tolist(), values[:, 0].tolist(), ranks, best_ids, best_values, tops, strict=True
        )
    ]


def _penalize_repetition(logits: Tensor, rows: list[int], sequences: Rows[Sequence]) -> None:
    if not rows:
        return
    states = [sequences[index].sampling for index in rows]
    seen = torch.stack([state.seen for state in states if state.seen is not None])
    penalty = _column([state.params.repetition_penalty for state in states], logits)
    before = logits[rows]
    logits[rows] = torch.where(seen, torch.where(before > 0, before / penalty, before * penalty), before)


def _penalize_presence(logits: Tensor, rows: list[int], sequences: Rows[Sequence]) -> None:
    if not rows:
        return
    states = [sequences[index].sampling for index in rows]
    counts = torch.stack([state.counts for state in states if state.counts is not None])
    frequency = _column([state.params.frequency_penalty for state in states], logits)
    presence = _column([state.params.presence_penalty for state in states], logits)
    logits[rows] -= frequency * counts + presence * (counts > 0)


def _draw(logits: Tensor, states: Rows[SamplingState], places: Rows[int]) -> Tensor:
    """One token a row of `logits` [n, V], by temperature, truncation, and each row's own random number."""
    scores = logits - logits.amax(dim=-1, keepdim=True)
    scores /= _column([state.params.temperature for state in states], logits)
    if any(state.params.min_p > 0 for state in states):
        floors = [math.log(state.params.min_p) if state.params.min_p > 0 else -math.inf for state in states]
        scores.masked_fill_(scores < _column(floors, logits), -torch.inf)
    truncated = [index for index, state in enumerate(states) if state.truncates]
    if truncated:
        params = [states[index].params for index in truncated]
        top_k = torch.tensor([p.top_k or logits.shape[1] for p in params], device=logits.device)
        top_p = torch.tensor([p.top_p if p.top_p < 1 else math.inf for p in params], device=logits.device)
        floor = _threshold(scores[truncated], top_k, top_p, CANDIDATES)
        scores[truncated] = scores[truncated].masked_fill(scores[truncated] < floor[:, None], -torch.inf)
    cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1)
    points = _column([state.uniform(place) for state, place in zip(states, places, strict=True)], logits)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]


def _threshold(scores: Tensor, top_k: Tensor, top_p: Tensor, candidates: int) -> Tensor:
    """Score of the last token that each row keeps, [n]. Tokens that tie with it are kept too."""
    count = min(candidates, scores.shape[1])
    best = scores.topk(count, dim=-1).values
    kept = torch.arange(count, device=scores.device) < top_k[:, None]
    # Top-p is a share of what top-k left; where that is more than was looked at, of the whole row.
    mass = torch.where(top_k <= count, best.masked_fill(~kept, -torch.inf).logsumexp(-1), scores.logsumexp(-1))
    shares = torch.exp(best - mass[:, None])
    cumulative = shares.cumsum(dim=-1)
    kept &= cumulative - shares < top_p[:, None]
    floor = best.gather(1, kept.sum(dim=-1, keepdim=True) - 1)[:, 0]
    open_rows = (kept[:, -1] & (top_k > count)).nonzero()[:, 0]
    if count < scores.shape[1] and len(open_rows):
        floor[open_rows] = _threshold(scores[open_rows], top_k[open_rows], top_p[open_rows], scores.shape[1])
    return floor


def _column(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
