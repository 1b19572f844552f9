"""The model's tokenizer: text to ids, ids to text, and the bytes of a single token."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from core.messages import ConfigError
from core.openai.detokenize import (
    BytesDetokenizer,
    Detokenizer,
    TokenBytes,
    WindowDetokenizer,
    sentencepiece,
    spelling,
)

log = logging.getLogger(__name__)

SAMPLES = (
    "",
    " ",
    "Hello, world! It's 3.14159 o'clock; don't   panic.\n\n\tdef f(x):\r\n        return x**2  # ok\n",
    "Ünïcödé, 東京都, עברית, हिन्दी, 😀👩‍👩‍👧, e\u0301 vs é, ﬁ, \u00a0\u2003, x\u200by.",
    "0123456789 1,234,567.89 0xDEADBEEF aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ............ ----====",
)
"""What a fast encoder must encode exactly as `tokenizers` does before it is trusted."""

_SLOW_INLINE = 4_096
_FAST_INLINE = 65_536


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Encoder(Protocol):
    def encode(self, text: str, /, *, add_special_tokens: bool) -> _Encoding: ...


class TextTokenizer:
    """A `tokenizer.json` with its `tokenizer_config.json`."""

    def __init__(self, folder: str | Path, *, fast: bool = True) -> None:
        """Loads the tokenizer. Raises `ConfigError` when the folder has none, or one that cannot be read."""
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"No tokenizer.json in '{self.folder}': name a model folder that has one.")
        try:
            self._hf = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with a file
            raise ConfigError(f"'{file}' cannot be read as a tokenizer: {error}. Download it again.") from error
        self._hf.no_truncation()
        self._hf.no_padding()
        self.config = read_json(self.folder / "tokenizer_config.json")
        self._special = frozenset(i for i, token in self._hf.get_added_tokens_decoder().items() if token.special)
        self._spelling = spelling(self._hf)
        self._bytes_of = self._spelling.of if self._spelling is not None else sentencepiece
        self._plain = TokenBytes(self._hf, self._bytes_of)
        self.show(frozenset())
        quick = _fast_encoder(file, self._hf, self._special) if fast else None
        self._encoder: _Encoder = quick or self._hf
        self.inline_chars = _FAST_INLINE if quick else _SLOW_INLINE
        """Texts up to this length cost about a millisecond; longer ones belong in a thread."""

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return self._hf.get_vocab_size(with_added_tokens=True)

    def show(self, tokens: frozenset[str]) -> None:
        """Keeps these special tokens in the text although special tokens are skipped: parsers look for them."""
        shown = {self._hf.token_to_id(t) for t in tokens}
        self._hidden = self._special - shown
        self._skipping = TokenBytes(self._hf, self._bytes_of, self._hidden)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text. Thread-safe."""
        return self._encoder.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of all ids at once."""
        return self._hf.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A decoder for one sequence."""
        if self._spelling is not None:
            table = self._skipping if skip_special_tokens else self._plain
            return BytesDetokenizer(table, strips_space=self._spelling.strips_space)
        return WindowDetokenizer(self._hf, self._hidden if skip_special_tokens else frozenset())

    def token_id(self, token: str) -> int | None:
        """The id of one token, if the vocabulary has it."""
        return self._hf.token_to_id(token)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; "" for an unused id."""
        return self._hf.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token contributes to the text, in bytes; part of a character is possible."""
        return self._plain[token_id]


def _fast_encoder(file: Path, reference: tokenizers.Tokenizer, special: frozenset[int]) -> _Encoder | None:
    """`fastokens` on the same file, or None where it is absent, refuses the file or disagrees on a sample."""
    try:
        quick = importlib.import_module("fastokens").Tokenizer.from_file(str(file))
        marks = [reference.id_to_token(i) or "" for i in sorted(special)[:8]]
        for sample in (*SAMPLES, "a ".join(marks) + "\n" + "".join(marks)):
            for add in (False, True):
                if (
                    quick.encode(sample, add_special_tokens=add).ids
                    != reference.encode(sample, add_special_tokens=add).ids
                ):
                    log.info("fastokens disagrees with tokenizers on %r; tokenizers encodes.", sample)
                    return None
    except ImportError:
        log.info("fastokens is not installed; tokenizers encodes.")
        return None
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        log.info("fastokens cannot use '%s' (%s); tokenizers encodes.", file, error)
        return None
    return quick  # type: ignore[no-any-return]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder; {} when the file is absent. Raises `ConfigError` when it is broken."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{file}' is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"'{file}' has a {type(value).__name__} where a JSON object is expected.")
    return value
