"""Reads a bare scalar the same way on the command line and in a file (YAML 1.2 core schema)."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    "true": True, "True": True, "TRUE": True,
    "false": False, "False": False, "FALSE": False,
    "null": None, "Null": None, "NULL": None, "~": None,
}  # fmt: skip


def parse_scalar(text: str) -> Any:
    """Whole number, number, true/false, null, else the text. `no`, `on`, `1_000` and `12:30` are text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse_override(text: str) -> Any:
    """JSON, else a bare scalar."""
    if text[:1] in ("{", "[", '"'):
        try:
            return json.loads(text, parse_constant=_refuse)
        except ValueError:
            return text
    return parse_scalar(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
