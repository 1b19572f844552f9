"""Attention over the paged KV cache, in place of a Hugging Face model's own.

A step packs the tokens of all its sequences into one row, `[1, T]`. Each layer writes the new keys and values to their
slots and then attends group by group: a group is a number of sequences of similar size whose contexts are gathered
from their blocks into one padded batch. What a step needs for that (rows, block tables, masks) is the same in every
layer with the same window; it is made once a step, in `batch.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engines.torch.kv_cache import PagedCache

NAME = "dynamo_paged"
"""Under which `paged_attention` is registered with `transformers.AttentionInterface`."""


@dataclass(frozen=True, slots=True)
class Group:
    """`B` sequences that attend together, with `Q` new tokens each and contexts of up to `S` tokens.

    Shorter members are padded: their last row is repeated, which computes and writes the same result twice.
    """

    size: tuple[int, int]
    """(B, Q)."""
    rows: Tensor | None
    """[B * Q] rows of the packed batch; None when they are all of it, in order."""
    blocks: Tensor | None
    """[B * blocks each] block ids; None for one prompt from its start, whose context is what was just computed."""
    mask: Tensor | None
    """[B, 1, Q, S], added to the scores; None is causal. Always given when `blocks` is."""


@dataclass(frozen=True, slots=True)
class Paged:
    """What a step's attention works on, handed through the model to every layer."""

    cache: PagedCache
    slots: Tensor
    """[T] where each new token's key and value go: block id times block size, plus the position in the block."""
    groups: dict[int | None, list[Group]]
    """By sliding window, in tokens; None is full attention."""


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    paged: Paged,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query` [1, H, T, D], `key` and `value` [1, KV, T, D]; gives [1, T, H, D]. As `AttentionInterface` calls it."""
    layer = paged.cache.layers[module.layer_idx]  # type: ignore[index]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    _write(layer.keys, paged.slots, keys)
    _write(layer.values, paged.slots, values)
    queries = query[0].transpose(0, 1)
    output = None
    for group in paged.groups[layer.window]:
        q = queries if group.rows is None else queries.index_select(0, group.rows)
        q = q.view(*group.size, *q.shape[1:])
        if group.blocks is None:
            k, v = (keys, values) if group.rows is None else (keys[group.rows], values[group.rows])
            k, v = k.unsqueeze(0), v.unsqueeze(0)
        else:
            k = layer.keys.index_select(0, group.blocks).reshape(len(q), -1, *keys.shape[1:])
            v = layer.values.index_select(0, group.blocks).reshape(len(q), -1, *values.shape[1:])
        result = _attend(q, k, v, group.mask, scaling, softcap)
        if group.rows is None:
            return result.unsqueeze(0), None
        if output is None:
            output = result.new_empty(len(queries), *result.shape[1:])
        output.index_copy_(0, group.rows, result)
    assert output is not None, "a step has at least one group"
    return output.unsqueeze(0), None


def _write(store: Tensor, slots: Tensor, new: Tensor) -> None:
    """`store` [blocks, tokens, KV, D], `slots` [T], `new` [T, KV, D]."""
    if store.is_contiguous():
        store.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
    else:
        size = store.shape[1]
        store[slots // size, slots % size] = new


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """`q` [B, Q, H, D], `k` and `v` [B, S, KV, D]; gives [B * Q, H, D]."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    # For single tokens the query heads of one KV head become rows of one matrix, so that no key is repeated.
    q = q.view(batch, kv_heads, heads // kv_heads, -1) if length == 1 else q.transpose(1, 2)
    grouped = q.shape[1] != kv_heads
    if grouped and (softcap is not None or (mask is not None and q.is_cuda)):
        # CUDA's fused kernels take grouped heads or a mask, not both.
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        grouped = False
    if softcap is None:
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    else:
        out = _attend_softcapped(q, k, v, mask, scaling, softcap)
    if length == 1:
        return out.reshape(batch, heads, -1)
    return out.transpose(1, 2).reshape(batch * length, heads, -1)


def _attend_softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype) @ v
