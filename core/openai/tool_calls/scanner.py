"""Reads one call, `{"name": ..., "arguments": {...}}`, while it is still being written."""

from __future__ import annotations

from enum import Enum, auto

import msgspec

_SPACE = " \t\r\n"
_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


class _At(Enum):
    OPEN = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()
    IN_KEY = auto()
    IN_STRING = auto()
    IN_NESTED = auto()
    IN_SCALAR = auto()


class CallScanner:
    """A JSON object in pieces: its name as soon as it is complete, its arguments as raw text as they come.

    Keys may be in any order; other keys are skipped. Arguments that are a JSON string are unwrapped, as some models
    quote them.
    """

    def __init__(self) -> None:
        self._at = _At.OPEN
        self._key = ""
        self._value: list[str] = []
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._raw: list[str] = []
        self._arguments: list[str] = []
        self._taken = 0
        self.name: str | None = None
        self.done = False
        """The object is complete."""
        self.failed = False
        """This is no JSON object, or no call."""

    def feed(self, text: str) -> str:
        """Reads `text`; returns what comes after the object, "" while it is open. Stops when `failed` is set."""
        for i, char in enumerate(text):
            self._step(char)
            if self.failed:
                self._raw.append(text)
                return ""
            if self.done:
                self._raw.append(text[: i + 1])
                return text[i + 1 :]
        self._raw.append(text)
        return ""

    def take(self) -> str:
        """Argument text that was not taken yet."""
        fresh = "".join(self._arguments[self._taken :])
        self._taken = len(self._arguments)
        return fresh

    @property
    def raw(self) -> str:
        """Everything read, to be given back when it turns out not to be a call."""
        return "".join(self._raw)

    @property
    def arguments(self) -> str:
        """Raw JSON text so far."""
        return "".join(self._arguments)

    @property
    def valid(self) -> bool:
        """A complete call whose arguments are a JSON object."""
        if not self.done or self.name is None:
            return False
        try:
            return isinstance(msgspec.json.decode(self.arguments or "{}"), dict)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            return False

    def _step(self, char: str) -> None:
        at = self._at
        if at is _At.IN_NESTED:
            self._nested(char)
        elif at is _At.IN_STRING or at is _At.IN_KEY:
            self._string(char)
        elif at is _At.IN_SCALAR:
            if char in ",}" or char in _SPACE:
                self._end_value()
                self._step(char)
            else:
                self._value.append(char)
        elif char in _SPACE:
            return
        else:
            self._between(at, char)

    def _between(self, at: _At, char: str) -> None:
        if at is _At.OPEN and char == "{":
            self._at = _At.FIRST_KEY
        elif at in (_At.FIRST_KEY, _At.KEY) and char == '"':
            self._at, self._value = _At.IN_KEY, [char]
        elif at in (_At.FIRST_KEY, _At.COMMA) and char == "}":
            self.done = True
            self.failed = self.name is None
        elif at is _At.COLON and char == ":":
            self._at = _At.VALUE
        elif at is _At.COMMA and char == ",":
            self._at = _At.KEY
        elif at is _At.VALUE:
            self._begin_value(char)
        else:
            self.failed = True

    def _begin_value(self, char: str) -> None:
        self._value = [char]
        if char == '"':
            self._at = _At.IN_STRING
        elif char in "{[":
            self._at, self._depth, self._quoted = _At.IN_NESTED, 1, False
            if self._key in _ARGUMENT_KEYS:
                self._arguments.append(char)
        elif char in "}],:":
            self.failed = True
        else:
            self._at = _At.IN_SCALAR

    def _nested(self, char: str) -> None:
        if self._key in _ARGUMENT_KEYS:
            self._arguments.append(char)
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._at = _At.COMMA

    def _string(self, char: str) -> None:
        self._value.append(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            try:
                text = msgspec.json.decode("".join(self._value), type=str)
            except (msgspec.DecodeError, UnicodeError):
                self.failed = True
                return
            if self._at is _At.IN_KEY:
                self._key, self._at = text, _At.COLON
            else:
                self._at = _At.COMMA
                if self._key in _NAME_KEYS:
                    self.name = text
                elif self._key in _ARGUMENT_KEYS:
                    self._arguments.append(text)

    def _end_value(self) -> None:
        self._at = _At.COMMA
        if self._key in _ARGUMENT_KEYS and "".join(self._value) != "null":
            self.failed = True  # arguments are an object
        elif self._key in _NAME_KEYS:
            self.failed = True  # a name is a string
