"""How a model's KV lies in memory: the geometry of one block on one tensor-parallel rank.

KV is logically a tensor `[layer, part, head, token, element]`, where part 0 is K and part 1 is V. A worker cuts the
tokens into blocks and lays each block out as its attention kernels like it; `KvLayout` says how, so that the core can
find every head vector without knowing the engine. Only the vector of one head of one token (`head_size` elements) is
always contiguous; kernels that split even that need an engine-specific (opaque) payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import msgspec

ITEM_SIZES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}
"""Bytes of one element, by the name that torch and numpy give the type."""


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The KV geometry of one tensor-parallel rank. Raises `ValueError` when the fields contradict each other."""

    layers: int
    kv_heads: int
    """KV heads of the whole model, over all ranks."""
    head_size: int
    """Elements of one head's vector for one token."""
    block_size: int
    """Tokens in a block."""
    dtype: str
    """A key of `ITEM_SIZES`."""
    dims: str = "NHD"
    """Order of the dimensions inside a block, outermost first: token N, head H, element D (always last), and, where
    they lie inside the block, part K and layer L. A part or layer that is not named has a memory region of its own:
    "NHD" and "HND" keep K and V of each layer in separate tensors, "KNHD" stacks them in a block, "HNKD" interleaves
    them head vector by head vector, "LKNHD" keeps all layers of a block together."""
    parts: int = 2
    """2: K and V; 1: a single latent vector (multi-head latent attention)."""
    tp_size: int = 1
    tp_rank: int = 0

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        for name in ("layers", "kv_heads", "head_size", "block_size", "parts", "tp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"KV layout: {name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ITEM_SIZES:
            raise ValueError(f"KV layout: dtype {self.dtype!r} is unknown; expected one of {', '.join(ITEM_SIZES)}")
        if self.parts > 2:
            raise ValueError(f"KV layout: parts is {self.parts}; it is 2 (K and V) or 1 (a latent)")
        known = set("NHDKL")
        if len(set(self.dims)) != len(self.dims) or not set("NHD") <= set(self.dims) <= known or self.dims[-1] != "D":
            raise ValueError(
                f"KV layout: dims is {self.dims!r}; it must name N, H and D once each, K and L at most once, D last"
            )
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"KV layout: tp_rank is {self.tp_rank}; it must lie in [0, tp_size={self.tp_size})")
        larger, smaller = max(self.tp_size, self.kv_heads), min(self.tp_size, self.kv_heads)
        if larger % smaller:
            raise ValueError(
                f"KV layout: {self.kv_heads} KV heads cannot be shared by {self.tp_size} ranks: one must divide the "
                "other"
            )

    @cached_property
    def heads(self) -> range:
        """Heads on this rank. With more ranks than heads, `tp_size / kv_heads` neighbouring ranks hold the same one."""
        if self.tp_size <= self.kv_heads:
            share = self.kv_heads // self.tp_size
            return range(self.tp_rank * share, (self.tp_rank + 1) * share)
        head = self.tp_rank // (self.tp_size // self.kv_heads)
        return range(head, head + 1)

    @cached_property
    def vector_bytes(self) -> int:
        """Bytes of one head's vector: the smallest contiguous piece."""
        return self.head_size * ITEM_SIZES[self.dtype]

    @cached_property
    def strides(self) -> Mapping[str, int]:
        """Bytes from one index to the next inside a block, for every letter of `dims` but D."""
        sizes = {"L": self.layers, "K": self.parts, "N": self.block_size, "H": len(self.heads)}
        strides: dict[str, int] = {}
        step = self.vector_bytes
        for letter in reversed(self.dims[:-1]):
            strides[letter] = step
            step *= sizes[letter]
        return strides

    @cached_property
    def region_count(self) -> int:
        """Memory regions (tensors) over which a block is spread."""
        return (1 if "L" in self.dims else self.layers) * (1 if "K" in self.dims else self.parts)

    @cached_property
    def region_bytes(self) -> int:
        """Bytes of one block in one region; all regions are alike."""
        vectors = self.layers * self.parts * self.block_size * len(self.heads)
        return vectors // self.region_count * self.vector_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return self.region_count * self.region_bytes

    def locate(self, layer: int, part: int) -> tuple[int, int]:
        """The region that holds a layer's K (part 0) or V (part 1), and the byte offset there within a block.

        Regions are numbered layer by layer, K before V.
        """
        offset = 0
        region = 0
        if "L" in self.dims:
            offset += layer * self.strides["L"]
        else:
            region = layer
        if "K" in self.dims:
            offset += part * self.strides["K"]
        else:
            region = region * self.parts + part
        return region, offset

    def same_block(self, other: KvLayout) -> bool:
        """Whether a block of `other` has the same bytes in the same places, so that whole blocks can be copied."""
        return (
            self.layers == other.layers
            and self.parts == other.parts
            and self.head_size == other.head_size
            and self.block_size == other.block_size
            and self.dtype == other.dtype
            and self.heads == other.heads
            and self.dims == other.dims
        )

    def require_convertible(self, other: KvLayout) -> None:
        """Raise `ValueError`, naming the field and both values, unless KV of `other` can be rearranged into this."""
        for name in ("layers", "kv_heads", "head_size", "dtype", "parts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"KV layouts differ in {name}: {mine} here and {theirs} there. Only block size, order of "
                    "dimensions and tensor parallelism can be converted; run the same model and KV dtype on both sides"
                )


def shards_for(target: KvLayout, sources: list[KvLayout]) -> list[tuple[int, range]]:
    """Which source ranks a target rank reads, and which heads from each: indexes into `sources` and disjoint heads.

    Raises `ValueError` when the sources together lack a head that the target needs.
    """
    missing = set(target.heads)
    chosen: list[tuple[int, range]] = []
    for index, source in enumerate(sources):
        wanted = [head for head in source.heads if head in missing]
        if wanted:
            chosen.append((index, range(wanted[0], wanted[-1] + 1)))
            missing.difference_update(wanted)
    if missing:
        raise ValueError(
            f"KV heads {sorted(missing)} are needed by rank {target.tp_rank} of {target.tp_size} and offered by none "
            f"of the {len(sources)} source shards (which hold {[list(s.heads) for s in sources]}): export every rank"
        )
    return chosen
