"""Token ids back to text, as they come. A character that spans tokens appears once, whole.

Whatever the split into pushes, the pieces together are exactly what decoding all ids at once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Set
from typing import Protocol

from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream


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


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, found when first needed. Hidden ids have none."""

    def __init__(self, tokenizer: HfTokenizer, hidden: Set[int] = frozenset()) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            value = b""  # an id between the vocabulary and the model's padded output layer
        else:
            try:
                value = bytes([_ALPHABET[c] for c in token])
            except KeyError:
                value = token.encode()  # an added token is stored as plain text
        self[token_id] = value
        return value


class BytesDetokenizer:
    """For byte-level vocabularies, where a token is a fixed string of bytes: three times as fast as the library's."""

    __slots__ = ("_bytes_of", "_decode")

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer.push`."""
        bytes_of = self._bytes_of
        decode = self._decode
        text = ""
        for token_id in token_ids:
            text += decode(bytes_of[token_id])
        return text

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._decode(b"", True)


class StreamDetokenizer:
    """For every other vocabulary: `tokenizers.DecodeStream`, plus the rest that it withholds at the end."""

    __slots__ = ("_emitted", "_hidden", "_ids", "_stream", "_tokenizer")

    def __init__(self, tokenizer: HfTokenizer, hidden: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """See `Detokenizer.push`."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._hidden:
                self._ids.append(token_id)
                text += self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """See `Detokenizer.flush`."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[self._emitted :]
