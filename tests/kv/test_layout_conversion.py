"""Conversion plans between layouts, held against plain index arithmetic on the logical tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.kv.layout import KvLayout, shards_for
from core.kv.transfer.execute import convert_blocks, copy_bytes
from core.kv.transfer.plan import Group, narrow_pattern, runs, strided_copies, token_groups
from core.kv.transfer.pool import KvPool

DIMS = ("NHD", "HND", "KNHD", "KHND", "HNKD", "LKNHD", "LNHD", "NLHKD", "HLND")


def read_tensor(pool: KvPool, blocks: list[int], tokens: range) -> np.ndarray:
    """The logical tensor [layer, part, head, token, byte] of a pool, found vector by vector."""
    layout = pool.layout
    out = np.zeros((layout.layers, layout.parts, len(layout.heads), len(tokens), layout.vector_bytes), np.uint8)
    for layer in range(layout.layers):
        for part in range(layout.parts):
            region, base = layout.locate(layer, part)
            for head in range(len(layout.heads)):
                for index, token in enumerate(tokens):
                    offset = base + head * layout.strides["H"] + token % layout.block_size * layout.strides["N"]
                    (piece,) = pool.slices(
                        [blocks[token // layout.block_size]], ((region, offset, layout.vector_bytes),)
                    )
                    out[layer, part, head, index] = np.frombuffer(piece, np.uint8)
    return out


def fill(pool: KvPool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for start, size in pool.spans:
        data = rng.integers(0, 256, size, np.uint8)
        copy_bytes([(data.ctypes.data, start, size)])


@st.composite
def conversions(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    common = {
        "layers": draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_size": draw(st.sampled_from([1, 3, 4])),
        "dtype": draw(st.sampled_from(["bfloat16", "float32", "int8"])),
        "parts": draw(st.sampled_from([1, 2])),
    }

    def side():
        tp_size = draw(st.sampled_from([1, 2, 4, 8]))
        dims = draw(st.sampled_from(DIMS))
        block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
        return [
            KvLayout(**common, block_size=block_size, dims=dims, tp_size=tp_size, tp_rank=rank)
            for rank in range(tp_size)
        ]

    tokens = draw(st.integers(1, 20))
    skips = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    return side(), side(), tokens, skips, draw(st.integers(0, 2**32 - 1))


def make_pool(layout: KvLayout, num_blocks: int, *, joined: bool) -> KvPool:
    if joined:
        return KvPool.allocate(layout, num_blocks)
    buffers = [bytearray(layout.region_bytes * num_blocks) for _ in range(layout.region_count)]
    return KvPool.from_buffers(layout, buffers, num_blocks)


@settings(max_examples=150, deadline=None)
@given(conversions(), st.booleans(), st.booleans(), st.booleans())
def test_any_layout_becomes_any_other_and_back(case, joined, by_runs, shuffled):
    """Through every shard of both sides: the target holds the same logical tensor, and a second trip restores it."""
    sources, targets, tokens, (source_skip, target_skip), seed = case
    rng = np.random.default_rng(seed)

    def lists(layouts, skip):
        count = -(-(skip + tokens) // layouts[0].block_size)
        num_blocks = count + 2
        blocks = rng.permutation(num_blocks)[:count].tolist() if shuffled else list(range(count))
        return blocks, [make_pool(one, num_blocks, joined=joined) for one in layouts]

    source_blocks, source_pools = lists(sources, source_skip)
    target_blocks, target_pools = lists(targets, target_skip)
    back_pools = [make_pool(one, source_pools[0].num_blocks, joined=not joined) for one in sources]
    for number, pool in enumerate(source_pools):
        fill(pool, number)
    # Replicated heads hold the same bytes on every rank, as they do in a real deployment.
    for pool in source_pools:
        for first in source_pools:
            if first is pool:
                break
            if first.layout.heads == pool.layout.heads:
                every = range(pool.num_blocks)
                for piece, copy in zip(
                    first.slices(every, first.by_region), pool.slices(every, pool.by_region), strict=True
                ):
                    copy[:] = piece
                break

    def move(from_pools, from_blocks, from_skip, to_pools, to_blocks, to_skip):
        groups = token_groups(
            from_pools[0].layout.block_size,
            to_pools[0].layout.block_size,
            from_blocks,
            to_blocks,
            tokens=tokens,
            source_skip=from_skip,
            target_skip=to_skip,
        )
        for to in to_pools:
            for index, heads in shards_for(to.layout, [pool.layout for pool in from_pools]):
                if by_runs:
                    copy_bytes(tuple(map(int, row)) for row in runs(from_pools[index], to, groups, heads=heads))
                else:
                    convert_blocks(from_pools[index], to, groups, heads=heads)

    move(source_pools, source_blocks, source_skip, target_pools, target_blocks, target_skip)
    move(target_pools, target_blocks, target_skip, back_pools, source_blocks, source_skip)
    for pool, back in zip(source_pools, back_pools, strict=True):
        span = range(source_skip, source_skip + tokens)
        assert np.array_equal(read_tensor(pool, source_blocks, span), read_tensor(back, source_blocks, span))
    full = {}
    for pool in source_pools:
        tensor = read_tensor(pool, source_blocks, range(source_skip, source_skip + tokens))
        full.update({head: tensor[:, :, index] for index, head in enumerate(pool.layout.heads)})
    for pool in target_pools:
        got = read_tensor(pool, target_blocks, range(target_skip, target_skip + tokens))
        for index, head in enumerate(pool.layout.heads):
            assert np.array_equal(got[:, :, index], full[head])


@settings(max_examples=60, deadline=None)
@given(conversions())
def test_conversion_touches_nothing_outside_the_tokens(case):
    """Bytes of the target beside the copied tokens stay as they were."""
    sources, targets, tokens, (source_skip, target_skip), _ = case
    source, target = KvPool.allocate(sources[0], 40), KvPool.allocate(targets[0], 40)
    for start, size in source.spans:
        ones = np.full(size, 255, np.uint8)
        copy_bytes([(ones.ctypes.data, start, size)])
    groups = token_groups(
        sources[0].block_size,
        targets[0].block_size,
        list(range(40)),
        list(range(40)),
        tokens=tokens,
        source_skip=source_skip,
        target_skip=target_skip,
    )
    heads = range(
        max(sources[0].heads.start, targets[0].heads.start), min(sources[0].heads.stop, targets[0].heads.stop)
    )
    convert_blocks(source, target, groups)
    written = sum(
        int(np.count_nonzero(np.frombuffer(view, np.uint8))) for view in target.slices(range(40), target.by_region)
    )
    layout = sources[0]
    assert written == layout.layers * layout.parts * len(heads) * tokens * layout.vector_bytes


def test_equal_layouts_copy_whole_regions():
    """Nothing is cut that need not be: one run a region and adjacent blocks, one for all in a joined pool."""
    layout = KvLayout(layers=2, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16")
    groups = token_groups(16, 16, [0, 1, 2, 5], [3, 4, 5, 0], tokens=64)
    (group,) = groups
    assert [copy.loops for copy in strided_copies(layout, layout, group)] == [()] * 4
    separate = KvPool.from_buffers(layout, [bytearray(layout.region_bytes * 6) for _ in range(4)], 6)
    assert len(runs(separate, separate, groups)) == 8
    assert runs(separate, separate, groups)[:, 2].tolist() == [3 * layout.region_bytes, layout.region_bytes] * 4


def test_head_major_layouts_of_other_block_size_copy_whole_head_runs():
    layout = KvLayout(layers=1, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16", dims="HND")
    larger = KvLayout(layers=1, kv_heads=4, head_size=8, block_size=32, dtype="bfloat16", dims="HND")
    groups = token_groups(16, 32, [0, 1], [0], tokens=32)
    assert [(group.source_token, group.target_token) for group in groups] == [(0, 0), (0, 16)]
    copies = strided_copies(layout, larger, groups[1])
    assert [(copy.run, copy.loops) for copy in copies] == [(256, ((4, 256, 512),))] * 2


def test_a_pattern_names_only_what_is_wanted():
    """Head-major: a rank's heads are one piece; token-major: one a token; a layer: its regions alone."""
    fields = {"layers": 2, "kv_heads": 4, "head_size": 8, "block_size": 4, "dtype": "int8"}
    assert narrow_pattern(KvLayout(**fields, dims="HND"), heads=range(2, 4), layers=range(1, 2)) == (
        (2, 64, 64),
        (3, 64, 64),
    )
    assert narrow_pattern(KvLayout(**fields), heads=range(2, 4), layers=range(0, 1))[:2] == ((0, 16, 16), (0, 48, 16))
    assert narrow_pattern(KvLayout(**fields), heads=None, layers=None, tokens=(1, 3))[0] == (0, 32, 64)


def test_ranges_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit the source list of 1 blocks of 16"):
        token_groups(16, 16, [0], [0, 1], tokens=17)
    layout = KvLayout(layers=2, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16")
    with pytest.raises(ValueError, match="are not a range within"):
        strided_copies(layout, layout, Group(0, 0, 1, [0], [0]), layers=range(1, 3))
    with pytest.raises(ValueError, match="not on both sides"):
        strided_copies(
            layout, KvLayout(**{**_fields(layout), "tp_size": 2}), Group(0, 0, 1, [0], [0]), heads=range(1, 4)
        )


def _fields(layout: KvLayout) -> dict:
    return {name: getattr(layout, name) for name in layout.__struct_fields__}


def test_a_big_conversion_is_vectorised():
    """4096 tokens of 8 layers convert in a bounded number of numpy calls, not one a token."""
    fields = {"layers": 8, "kv_heads": 4, "head_size": 64, "dtype": "bfloat16"}
    source = KvPool.allocate(KvLayout(**fields, block_size=16, dims="NHD"), 256)
    target = KvPool.allocate(KvLayout(**fields, block_size=64, dims="HND"), 64)
    groups = token_groups(16, 64, list(range(256)), list(range(64)), tokens=4096)
    assert len(groups) == 4
    convert_blocks(source, target, groups)
    table = runs(source, target, groups)
    assert table.shape == (8 * 2 * 4 * 4096, 3)
