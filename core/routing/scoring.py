"""Scores targets by what they hold of a prompt and by how busy they are.

    score = kv_hit_weight * hit_fraction - load_weight * relative_load

`hit_fraction` is the part of the prompt that a target holds, its blocks weighted by medium. `relative_load` is the work
ahead on the target as a multiple of the request's own prompt. Both count in prompts of this request, so the weights
say what a token saved is worth against a token to wait for: with the defaults, 1.0 and 0.5, a holder is left when the
work ahead of the request there is more than twice what its cache saves. Because the load has no upper end, no hit is
good enough to be worth any queue; because it is relative to the prompt, a short prompt looks at the load alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from core.kv import Target

MIN_PROMPT_TOKENS = 64
"""Prompts shorter than this count as this long, so that differences of a few tokens do not look enormous."""


def score_targets(
    hits: Sequence[float],
    loads: Sequence[float],
    *,
    prompt_tokens: int,
    block_size: int,
    kv_hit_weight: float,
    load_weight: float,
) -> list[float]:
    """Scores, parallel to `hits` (weighted blocks) and `loads` (work in tokens). Larger is better."""
    prompt = max(prompt_tokens, MIN_PROMPT_TOKENS)
    per_block = kv_hit_weight * block_size / prompt
    per_token = load_weight / prompt
    return [per_block * hit - per_token * load for hit, load in zip(hits, loads, strict=True)]


def best(scores: Sequence[float], loads: Sequence[float], rng: random.Random) -> int:
    """Position of the largest score; ties go to the lower load, then to chance."""
    top = max(scores)
    tied = [position for position, score in enumerate(scores) if score == top]
    if len(tied) > 1:
        lowest = min(loads[position] for position in tied)
        tied = [position for position in tied if loads[position] == lowest]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def least(loads: Sequence[float], rng: random.Random) -> int:
    """Position of the lowest load; ties go to chance."""
    lowest = min(loads)
    tied = [position for position, load in enumerate(loads) if load == lowest]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def column(values: Mapping[Target, float], targets: Sequence[Target]) -> list[float]:
    """One number a target, 0 where there is none."""
    get = values.get
    return [get(target, 0.0) for target in targets]
