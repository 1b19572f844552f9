"""Token ids back to text, as they come. A character that spans tokens appears once, whole.

Whatever the split into pushes, the pieces together are what decoding all ids at once gives. One exception, where the
whole is not known until its end: for SentencePiece byte tokens that spell no character, U+FFFD stands for each invalid
sequence, as Unicode recommends, and not for every byte of the run.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Set
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer as HfTokenizer


class Detokenizer(Protocol):
    """One sequence's decoder."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these ids; "" while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end of the sequence, with U+FFFD for bytes that are no character."""


def _byte_of_char() -> dict[str, int]:
    """The inverse of the byte-level alphabet: printable Latin-1 stands for itself, the rest is shifted past 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in set(printable))})
    return table


_ALPHABET = _byte_of_char()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level(token: str) -> bytes:
    """The bytes of a token in a byte-level vocabulary. An added token is stored as plain text."""
    try:
        return bytes([_ALPHABET[c] for c in token])
    except KeyError:
        return token.encode()


def sentencepiece(token: str) -> bytes:
    """The bytes of a token in a SentencePiece vocabulary: `▁` is a space, `<0xE6>` a byte."""
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte is not None else token.replace("▁", " ").encode()


class Spelling(NamedTuple):
    """How a vocabulary's tokens spell a text: their bytes one after the other."""

    of: Callable[[str], bytes]
    """Bytes of a token."""
    strips_space: bool
    """A space at the head of a text is left out."""


def spelling(tokenizer: HfTokenizer) -> Spelling | None:
    """Read off the tokenizer's decoder; None when its tokens change with their neighbours."""
    if tokenizer.decoder is None:
        return None
    state = json.loads(tokenizer.decoder.__getstate__())
    stages = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return Spelling(byte_level, strips_space=False)
    if kinds == ["Metaspace"] and stages[0]["replacement"] == "▁":
        return Spelling(sentencepiece, strips_space=stages[0]["prepend_scheme"] != "never")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replace, strips = stages[0], stages[3:]
        plain = replace["pattern"] == {"String": "▁"} and replace["content"] == " "
        if plain and strips in ([], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]):
            return Spelling(sentencepiece, strips_space=bool(strips))
    return None


class TokenBytes(dict[int, bytes]):
    """The bytes of each token, found when first needed. Hidden ids have none."""

    def __init__(
        self, tokenizer: HfTokenizer, bytes_of: Callable[[str], bytes], hidden: Set[int] = frozenset()
    ) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._tokenizer = tokenizer
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        # An id without a token lies between the vocabulary and the model's padded output layer.
        value = b"" if token is None else self._bytes_of(token)
        self[token_id] = value
        return value


class BytesDetokenizer:
    """For vocabularies whose tokens are fixed strings of bytes: three times as fast as `tokenizers.DecodeStream`."""

    __slots__ = ("_at_head", "_bytes_of", "_decode")

    def __init__(self, bytes_of: TokenBytes, *, strips_space: bool) -> None:
        self._bytes_of = bytes_of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._at_head = strips_space

    def push(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer.push`."""
        bytes_of = self._bytes_of
        decode = self._decode
        text = ""
        for token_id in token_ids:
            text += decode(bytes_of[token_id])
        if self._at_head and text:
            self._at_head = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For every other vocabulary: what a token adds to the text of the few tokens before it.

    `tokenizers.DecodeStream` does the same, but raises on ids that a model is free to choose.
    """

    __slots__ = ("_hidden", "_ids", "_shown", "_tokenizer")

    def __init__(self, tokenizer: HfTokenizer, hidden: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._ids: list[int] = []
        self._shown = 0
        """How many of `_ids` are in the text already; they are kept because the next token's text depends on them."""

    def push(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer.push`."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._hidden:
                self._ids.append(token_id)
                text += self._next(complete=False)
        return text

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._next(complete=True)

    def _next(self, *, complete: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown], skip_special_tokens=False)
        after = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not complete):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return after[len(before) :]
