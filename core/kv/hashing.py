"""Chained hashes of full token blocks: the core's own name for a cached prefix.

The hash of a block is XXH3-64 of its tokens (little-endian, 4 bytes each), seeded with the hash of the block before it.
The first block is seeded with `root_hash`, which covers the LoRA adapter and the cache salt. Two sequences of full
blocks therefore have the same last hash exactly when they are the same tokens under the same adapter and salt, up to
64-bit collisions: among a million blocks one in 37 million. A collision costs a cache hit, never a wrong answer,
because the engine looks its own cache up.

The same tokens give the same hashes in every process, on every platform, in every run: routers, workers and stored
snapshots can be compared. Changing anything here changes `SCHEME`.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache

from xxhash import xxh3_64_intdigest

from core.messages import RequestRejected

SCHEME = b"dynamo-kv-1"
"""Part of every root; a snapshot made under another scheme matches nothing."""

_TOKEN_BYTES = 4
_UINT32 = next(code for code in "IL" if array(code).itemsize == _TOKEN_BYTES)
"""Array type code of an unsigned 4-byte integer."""


@lru_cache(maxsize=4096)
def root_hash(lora: str | None = None, cache_salt: str | None = None) -> int:
    """The parent of a first block: one number per (LoRA adapter, cache salt), in [0, 2**64)."""
    parts = [SCHEME]
    for value in (lora, cache_salt):
        # A length before each text keeps ("ab", "c") apart from ("a", "bc"), and None apart from "".
        encoded = b"" if value is None else value.encode()
        parts.append(struct.pack("<q", -1 if value is None else len(encoded)) + encoded)
    return xxh3_64_intdigest(b"".join(parts))


def hash_blocks(token_ids: Sequence[int], block_size: int, parent: int) -> list[int]:
    """Hashes of the full blocks of `token_ids` that follow the block (or root) `parent`, each in [0, 2**64).

    `token_ids` is a list, a tuple, an `array` or a numpy vector; the last `len(token_ids) % block_size` ids are no
    full block and are left out. Raises `RequestRejected` for an id outside [0, 2**32), `ValueError` for a block size
    below 1.
    """
    if block_size < 1:
        raise ValueError(f"block size is {block_size}; expected at least 1")
    count = len(token_ids) // block_size
    if not count:
        return []
    packed = _pack(token_ids, count * block_size)
    # iter_unpack cuts the blocks in C: slicing a memoryview costs half as much again as hashing.
    blocks = struct.Struct(f"{block_size * _TOKEN_BYTES}s").iter_unpack(packed)
    return [parent := xxh3_64_intdigest(block, parent) for (block,) in blocks]


def prompt_hashes(
    token_ids: Sequence[int], block_size: int, *, lora: str | None = None, cache_salt: str | None = None
) -> list[int]:
    """`hash_blocks` of a whole prompt, from its root."""
    return hash_blocks(token_ids, block_size, root_hash(lora, cache_salt))


def _pack(token_ids: Sequence[int], count: int) -> array[int] | memoryview:
    """The first `count` ids, 4 bytes each, little-endian."""
    if isinstance(token_ids, list | tuple):
        whole = token_ids if len(token_ids) == count else token_ids[:count]
        try:
            packed = array(_UINT32, whole)
        except (OverflowError, TypeError):
            raise _bad_token(whole) from None
        if sys.byteorder == "big":
            packed.byteswap()
        return packed
    view = memoryview(token_ids)  # type: ignore[arg-type]  # arrays and numpy vectors are buffers
    if view.format == _UINT32 and view.c_contiguous and sys.byteorder == "little":
        return view[:count].cast("B")
    # Their own tolist knows types that a memoryview does not, such as another byte order.
    return _pack(token_ids[:count].tolist(), count)  # type: ignore[attr-defined]


def _bad_token(token_ids: Sequence[int]) -> RequestRejected:
    for position, token in enumerate(token_ids):
        try:
            array(_UINT32, [token])
        except (OverflowError, TypeError):
            return RequestRejected(
                f"Token {position} of the prompt is {token!r}; token ids are integers of 0 or more, "
                "smaller than the model's vocabulary.",
                param="prompt",
            )
    raise AssertionError("an array refused ids that are all in range")
