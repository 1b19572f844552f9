"""Geometry of KV blocks: where each head vector lies, and which ranks hold which heads."""

from __future__ import annotations

import msgspec
import pytest

from core.kv.layout import KvLayout, shards_for


def layout(**changes):
    fields = {"layers": 2, "kv_heads": 4, "head_size": 8, "block_size": 16, "dtype": "bfloat16"} | changes
    return KvLayout(**fields)


@pytest.mark.parametrize(
    ("dims", "regions", "strides"),
    [
        ("NHD", 4, {"N": 64, "H": 16}),
        ("HND", 4, {"H": 256, "N": 16}),
        ("KNHD", 2, {"K": 1024, "N": 64, "H": 16}),
        ("HNKD", 2, {"H": 512, "N": 32, "K": 16}),
        ("LKNHD", 1, {"L": 2048, "K": 1024, "N": 64, "H": 16}),
        ("LNHD", 2, {"L": 1024, "N": 64, "H": 16}),
    ],
)
def test_dims_decide_regions_and_strides(dims, regions, strides):
    """What is named lies inside the block; a part or layer that is not has a region of its own."""
    one = layout(dims=dims)
    assert one.region_count == regions
    assert one.strides == strides
    assert one.block_bytes == 2 * 2 * 4 * 16 * 8 * 2
    places = {one.locate(layer, part) for layer in range(2) for part in range(2)}
    assert len(places) == 4


def test_block_bytes_count_only_this_ranks_heads():
    assert layout(tp_size=2, tp_rank=1).block_bytes * 2 == layout().block_bytes
    assert list(layout(tp_size=2, tp_rank=1).heads) == [2, 3]


def test_more_ranks_than_heads_replicates_heads():
    assert [list(layout(kv_heads=2, tp_size=8, tp_rank=rank).heads) for rank in (0, 3, 4, 7)] == [[0], [0], [1], [1]]


def test_latent_attention_has_one_part():
    one = layout(kv_heads=1, parts=1, dims="NHD")
    assert one.region_count == 2
    assert one.block_bytes == 2 * 16 * 8 * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"dtype": "float64"}, "dtype 'float64' is unknown"),
        ({"dims": "NDH"}, "D last"),
        ({"dims": "ND"}, "D last"),
        ({"dims": "NNHD"}, "D last"),
        ({"parts": 3}, "parts is 3"),
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank is 2"),
        ({"kv_heads": 4, "tp_size": 3}, "cannot be shared"),
    ],
)
def test_contradictions_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        layout(**changes)


def test_layout_survives_the_wire_and_is_checked_there():
    one = layout(dims="HNKD", tp_size=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=KvLayout) == one
    broken = msgspec.to_builtins(one) | {"dims": "HD"}
    with pytest.raises(msgspec.ValidationError, match="D last"):
        msgspec.convert(broken, type=KvLayout)


def test_same_block_ignores_only_what_moves_no_byte():
    assert layout(kv_heads=2, tp_size=4, tp_rank=0).same_block(layout(kv_heads=2, tp_size=4, tp_rank=1))
    assert not layout(dims="HND").same_block(layout())
    assert not layout(tp_size=2, tp_rank=0).same_block(layout(tp_size=2, tp_rank=1))


def test_models_that_differ_cannot_be_converted():
    layout().require_convertible(layout(block_size=32, dims="LKHND", tp_size=4, tp_rank=3))
    with pytest.raises(ValueError, match="differ in dtype: bfloat16 here and float32 there"):
        layout().require_convertible(layout(dtype="float32"))


def test_shards_cover_each_head_once():
    """A rank reads each of its heads from exactly one source, also when sources replicate heads."""
    ranks = [layout(tp_size=4, tp_rank=rank) for rank in range(4)]
    assert shards_for(layout(), ranks) == [(rank, range(rank, rank + 1)) for rank in range(4)]
    assert shards_for(layout(tp_size=2, tp_rank=1), [layout()]) == [(0, range(2, 4))]
    replicas = [layout(kv_heads=2, tp_size=4, tp_rank=rank) for rank in range(4)]
    assert shards_for(layout(kv_heads=2), replicas) == [(0, range(0, 1)), (2, range(1, 2))]
    with pytest.raises(ValueError, match=r"heads \[2, 3\] are needed"):
        shards_for(layout(), ranks[:2])
