"""Pieces together are the whole text, whatever the ids and the split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from core.messages import ConfigError
from core.openai.detokenize import WindowDetokenizer
from core.openai.tokenizer import TextTokenizer

TEXTS = st.text(max_size=40) | st.sampled_from(
    ["👩‍👩‍👧 naïve 東京都", "a\ufffdb", "😀" * 5, "<tool_call> x", "e\u0301"]
)


def sentencepiece(folder: Path) -> Path:
    """A vocabulary as Llama 2 has it: spaces as ▁, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.é", "▁h", "he", "▁hello", "東"]
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, [("▁", "h"), ("h", "e")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    make = make_tokenizer if request.param == "byte-level" else sentencepiece
    return TextTokenizer(make(folder), fast=False)


def pieces(tokenizer: TextTokenizer, ids: list[int], cuts: list[int], *, skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    out, rest = [], ids
    for cut in cuts:
        out.append(detokenizer.push(rest[:cut]))
        rest = rest[cut:]
    return [*out, detokenizer.push(rest), detokenizer.flush()]


@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(0, 4), max_size=30))
def test_any_ids(any_tokenizer: TextTokenizer, data: st.DataObject, skip: bool, cuts: list[int]):
    """For SentencePiece without byte tokens, whose invalid sequences are told differently (see the module)."""
    ids = st.integers(0, any_tokenizer.vocab_size - 1)
    if any_tokenizer.token(3) == "<0x00>":
        ids = ids.filter(lambda i: not any_tokenizer.token(i).startswith("<0x"))
    some = data.draw(st.lists(ids, max_size=30))
    text = "".join(pieces(any_tokenizer, some, cuts, skip=skip))
    assert text == any_tokenizer.decode(some, skip_special_tokens=skip)


@given(text=st.text(max_size=20), data=st.data())
def test_byte_tokens(tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject):
    tokenizer = TextTokenizer(sentencepiece(tmp_path_factory.getbasetemp() / "bytes"), fast=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, [1] * len(ids), skip=False)) == tokenizer.decode(ids)
    wild = data.draw(st.lists(st.integers(3, 258), max_size=20))
    raw = bytes(i - 3 for i in wild)
    assert "".join(pieces(tokenizer, wild, [1] * 20, skip=False)) == raw.decode(errors="replace").removeprefix(" ")


@given(words=st.lists(st.sampled_from(["play", "##ing", "##ed", "the", ",", "東"]), max_size=12))
def test_tokens_that_depend_on_their_neighbours(words: list[str]):
    tokenizer = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(["[UNK]", "play", "##ing", "##ed", "the", ",", "東"])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    ids = [tokenizer.token_to_id(w) for w in words]
    detokenizer = WindowDetokenizer(tokenizer)
    assert "".join([detokenizer.push([i]) for i in ids] + [detokenizer.flush()]) == tokenizer.decode(ids)


@given(text=TEXTS)
def test_text_comes_back_and_no_character_is_shown_in_parts(tokenizer: TextTokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    out = pieces(tokenizer, ids, [1] * len(ids), skip=False)
    assert "".join(out) == text
    assert "\ufffd" not in "".join(out) or "\ufffd" in text


@given(text=st.text(alphabet="abc é東😀", max_size=20))
def test_bytes_of_tokens_make_up_the_text(any_tokenizer: TextTokenizer, text: str):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    raw = b"".join(any_tokenizer.token_bytes(i) for i in ids)
    head = " " if text and any_tokenizer.token(3) == "<0x00>" else ""  # SentencePiece begins a text with a space
    assert raw.decode() == head + text


def test_special_tokens_are_hidden_unless_a_parser_needs_them(folder: Path):
    tokenizer = TextTokenizer(folder, fast=False)
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, [], skip=True)) == "ab"
    tokenizer.show(frozenset({"<|im_end|>"}))
    assert "".join(pieces(tokenizer, ids, [], skip=True)) == "a<|im_end|>b"


def test_unused_ids_are_no_text(tokenizer: TextTokenizer):
    assert "".join(pieces(tokenizer, [tokenizer.vocab_size + 7], [], skip=False)) == ""


def test_fast_encoder_agrees_or_is_not_used(folder: Path):
    quick, slow = TextTokenizer(folder), TextTokenizer(folder, fast=False)
    assert quick.inline_chars > slow.inline_chars, "fastokens is a development dependency and knows this tokenizer"
    for text in ("Hello <|im_start|>user\n", "東京都 😀", "x" * 500):
        assert quick.encode(text, add_special_tokens=False) == slow.encode(text, add_special_tokens=False)


def test_missing_and_broken_tokenizers_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"No tokenizer\.json in"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        TextTokenizer(tmp_path)
