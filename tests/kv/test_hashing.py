"""Block hashes name prefixes: the same everywhere, different for anything that must not share a cache."""

import os
import subprocess
import sys
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.kv import hash_blocks, prompt_hashes, root_hash
from core.messages import RequestRejected

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_hashes_are_pinned():
    """A change of these numbers makes every stored snapshot and every mixed-version deployment miss: bump SCHEME."""
    assert root_hash() == 0x4FEBC1F4D8B261A4
    assert prompt_hashes(list(range(8)), 4) == [0xA5CCEB051080365D, 0x658F4C617E06C740]
    assert prompt_hashes(list(range(8)), 4, lora="a", cache_salt="t") == [0xB216201D24E9FDFE, 0xE8F8B8F4DFAFFC71]


def test_hashes_do_not_depend_on_the_process():
    code = "from core.kv import prompt_hashes; print(prompt_hashes(list(range(64)), 16, lora='x'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{prompt_hashes(list(range(64)), 16, lora='x')}\n".encode()}


@given(TOKENS, st.integers(1, 9))
def test_only_full_blocks_count(tokens, block_size):
    hashes = prompt_hashes(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    assert all(0 <= block < 2**64 for block in hashes)


@given(TOKENS, TOKENS, st.integers(1, 5))
def test_equal_hash_means_equal_prefix(left, right, block_size):
    for number, (a, b) in enumerate(
        zip(prompt_hashes(left, block_size), prompt_hashes(right, block_size), strict=False), start=1
    ):
        assert (a == b) == (left[: number * block_size] == right[: number * block_size])


@given(TOKENS, st.integers(1, 5), st.integers(0, 5))
def test_hashing_goes_on_where_it_stopped(tokens, block_size, cut):
    whole = prompt_hashes(tokens, block_size)
    head = whole[:cut]
    tail = hash_blocks(tokens[len(head) * block_size :], block_size, head[-1] if head else root_hash())
    assert head + tail == whole


@given(TOKENS)
def test_every_kind_of_sequence_hashes_alike(tokens):
    expected = prompt_hashes(tokens, 3)
    assert prompt_hashes(tuple(tokens), 3) == expected
    assert prompt_hashes(array("I", tokens), 3) == expected
    assert prompt_hashes(array("q", tokens), 3) == expected
    for dtype in (np.uint32, np.int64, np.dtype(">u4")):
        assert prompt_hashes(np.array(tokens, dtype=dtype), 3) == expected
    assert prompt_hashes(np.array(tokens + tokens, dtype=np.uint32)[::2], 3) == prompt_hashes((tokens + tokens)[::2], 3)


def test_adapter_and_salt_are_part_of_the_prefix():
    roots = [
        root_hash(lora, salt) for lora in (None, "", "a", "ab") for salt in (None, "", "a", "b", "ab", "tenant-1", "é")
    ]
    assert len(set(roots)) == len(roots)
    assert not set(prompt_hashes([1] * 8, 4)) & set(prompt_hashes([1] * 8, 4, cache_salt="s"))


@pytest.mark.parametrize("bad", [-1, 2**32, 2**70, "7", None, 1.5])
def test_what_is_no_token_is_named(bad):
    with pytest.raises(RequestRejected, match=r"Token 2 of the prompt is .*integers of 0 or more") as caught:
        prompt_hashes([5, 6, bad, 7], 4)
    assert caught.value.param == "prompt"


def test_negative_ids_in_an_array_are_no_token_either():
    with pytest.raises(RequestRejected, match="Token 1"):
        prompt_hashes(np.array([1, -1], dtype=np.int32), 2)


def test_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match="block size is 0"):
        prompt_hashes([1], 0)
