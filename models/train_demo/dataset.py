"""Training windows: documents as token ids with a loss weight per token, packed into rows."""

from __future__ import annotations

import multiprocessing
import time
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from . import corpus
from .tokenizer import END_OF_TEXT_ID, IM_END_ID, IM_START_ID

Ids = npt.NDArray[np.int16]
Weights = npt.NDArray[np.uint8]

REPLY, OTHER, PADDING = 2, 1, 0  # what a token is; `train` turns it into a loss weight


class Windows(NamedTuple):
    """Rows of packed documents; `kinds` says which tokens are replies, other text and padding."""

    ids: Ids
    kinds: Weights


def encode(tokenizer: Tokenizer, document: list[corpus.Message]) -> tuple[list[int], list[int]]:
    """Token ids and kinds of one document, exactly as the chat template lays it out."""
    ids: list[int] = []
    kinds: list[int] = []

    def add(tokens: list[int], kind: int) -> None:
        ids.extend(tokens)
        kinds.extend([kind] * len(tokens))

    for role, text in document:
        if role == "text":
            add(tokenizer.encode(text).ids, REPLY)
        elif role == "assistant":
            add([IM_START_ID, *tokenizer.encode("assistant\n").ids], OTHER)
            add([*tokenizer.encode(text).ids, IM_END_ID], REPLY)
            add(tokenizer.encode("\n").ids, OTHER)
        else:
            add([IM_START_ID, *tokenizer.encode(f"{role}\n{text}").ids, IM_END_ID], OTHER)
            add(tokenizer.encode("\n").ids, OTHER)
    add([END_OF_TEXT_ID], REPLY)
    return ids, kinds


def _pack(job: tuple[str, int, int, int, bool]) -> Windows:
    """Fill `count` rows of `length` tokens with whole documents."""
    tokenizer_json, seed, count, length, long = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = Random(seed)
    ids = np.full((count, length), END_OF_TEXT_ID, dtype=np.int16)
    kinds = np.full((count, length), PADDING, dtype=np.uint8)
    row = filled = 0
    while row < count:
        turns = rng.choice((8, 16, 32, 64, 96))
        document = corpus.long_document(rng, turns) if long else corpus.document(rng)
        tokens, kind = encode(tokenizer, document)
        if filled and filled + len(tokens) > length and (not long or filled > length * 3 // 4):
            row, filled = row + 1, 0
            if row == count:
                break
        tokens, kind = tokens[: length - filled], kind[: length - filled]
        ids[row, filled : filled + len(tokens)] = tokens
        kinds[row, filled : filled + len(tokens)] = kind
        filled += len(tokens)
        if filled == length:
            row, filled = row + 1, 0
    return Windows(ids, kinds)


def windows(tokenizer: Tokenizer, seed: int, count: int, length: int, long: bool, workers: int) -> Windows:
    """Make packed rows; the result depends on the seed only, not on the number of workers."""
    began = time.monotonic()
    share = max(1, count // 64)
    text = tokenizer.to_str()
    jobs = [
        (text, seed * 1_000_003 + index, min(share, count - done), length, long)
        for index, done in enumerate(range(0, count, share))
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_pack, jobs, chunksize=1)
    made = Windows(np.concatenate([p.ids for p in parts]), np.concatenate([p.kinds for p in parts]))
    used, replies = int((made.kinds > 0).sum()), int((made.kinds == REPLY).sum())
    print(
        f"{count} rows of {length}: {used:,} tokens ({replies:,} in replies, "
        f"{100 * used / made.kinds.size:.0f}% filled) in {time.monotonic() - began:.1f} s",
        flush=True,
    )
    return made
