"""What a service's `Config` accepts: its keys, their types in words, and markers that go into `Annotated`."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from core.graph.config.origin import Node, Tree, Value, canonical, plain
from core.graph.errors import SettingError


@dataclass(frozen=True)
class Needs:
    """The key has an effect only with `service` in the served graph; without it, values not in `unless` are refused."""

    service: str
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Follows:
    """When nobody sets the key, it takes the value that was set for the same key of `service`."""

    service: str


@dataclass(frozen=True)
class Known:
    """The value is one of some names that are only known when they are asked for, such as those of plug-ins."""

    names: Callable[[], Iterable[str]]
    what: str
    """One of them, in words: "routing policy"."""


@dataclass(frozen=True)
class Secret:
    """The value is not shown."""


_MARKERS = (Needs, Follows, Known, Secret)


@dataclass(frozen=True)
class Key:
    """One key of a service."""

    name: str
    """With dashes."""
    attribute: str
    type: Any
    default: Any
    markers: tuple[Any, ...]

    def marker(self, kind: type[Any]) -> Any | None:
        """The marker of this kind, if the key has one."""
        return next((m for m in self.markers if isinstance(m, kind)), None)


@cache
def keys_of(struct: type[msgspec.Struct]) -> Mapping[str, Key]:
    """Keys by name. The class attributes `INTERNAL` (fields that are not keys) and `FOLLOWS` (a service) apply."""
    internal: frozenset[str] = getattr(struct, "INTERNAL", frozenset())
    follows: str | None = getattr(struct, "FOLLOWS", None)
    found: dict[str, Key] = {}
    for info in msgspec.structs.fields(struct):
        if info.name in internal:
            continue
        markers = tuple(m for m in getattr(info.type, "__metadata__", ()) if isinstance(m, _MARKERS))
        if follows and not any(isinstance(m, Follows) for m in markers):
            markers = (*markers, Follows(follows))
        default = info.default_factory() if info.default is msgspec.NODEFAULT else info.default
        name = canonical(info.name)
        found[name] = Key(name, info.name, info.type, default, markers)
    return found


def is_struct(kind: Any) -> bool:
    """Whether a key's value is a mapping with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def convert(node: Node, kind: Any, label: str) -> Any:
    """A node's value in the type `kind`. Raises `SettingError` saying what was expected and found."""
    data = plain(node)
    candidates = [data]
    if isinstance(node, Value):
        if node.raw is not None and isinstance(data, bool | int | float):
            candidates.append(node.raw)
        if isinstance(data, str) and data.lstrip().startswith("{"):
            candidates += _as_json(data)
    for candidate in candidates:
        try:
            return msgspec.convert(candidate, kind)
        except msgspec.ValidationError:
            continue
    shown = json.dumps(data, ensure_ascii=False, default=str)
    if isinstance(node, Tree) and not data:
        shown = "nothing"
    raise SettingError(f"{node.origin}: {label} must be {in_words(kind)}, found {shown}.")


def in_words(kind: Any) -> str:
    """A type as a person would say it: "a whole number of at least 1, or null"."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [b for m in arguments[1:] if isinstance(m, msgspec.Meta) for b in _bounds(m)]
        return " ".join([in_words(arguments[0]), *bounds])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else in_words(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    if origin in (list, tuple):
        return f"a list of {_PLURALS.get(arguments[0], 'values')}"
    if origin is dict or kind is dict or is_struct(kind):
        return "a mapping"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "a value"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _bounds(meta: msgspec.Meta) -> list[str]:
    bounds = []
    for value, words in ((meta.ge, "of at least"), (meta.gt, "above"), (meta.le, "of at most"), (meta.lt, "below")):
        if value is not None:
            bounds.append(f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}")
    return [" and ".join(bounds)] if bounds else []


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return []
