"""Where a configuration value comes from, and the tree in which values with their origins are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from core.graph.errors import SettingError


class Layer(IntEnum):
    """Layers of configuration; a larger one wins."""

    DEFAULT = 0
    FOLLOWS = 1
    """The value of another service's key that this one takes when nobody sets it."""
    DECORATOR = 2
    COMMON = 3
    FILE = 4
    ENVIRONMENT = 5
    SHORTCUT = 6
    """`--engine`, `--model`, `--port`: several services at once, so a service's own override wins."""
    COMMAND_LINE = 7


@dataclass(frozen=True, slots=True)
class Origin:
    """A place that a user can find again."""

    layer: Layer
    place: str
    """"configs/agg.yaml:12", "--Worker.model", "@service of Worker" ..."""

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True, slots=True)
class Value:
    """A leaf: scalar, list or null."""

    data: Any
    origin: Origin
    raw: str | None = None
    """The text as it was written, where it was a bare scalar: what a text-typed key takes it for."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A mapping. Keys that differ only in dashes and underscores are one key; the spelling is kept for show."""

    origin: Origin
    entries: Mapping[str, tuple[str, Node]]
    """Canonical key to (key as written, node)."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, key: str) -> Node | None:
        """The node under a key, however it is spelt."""
        entry = self.entries.get(canonical(key))
        return entry[1] if entry else None

    def without(self, *keys: str) -> Tree:
        """This tree, less some keys."""
        dropped = {canonical(k) for k in keys}
        return Tree(self.origin, {k: v for k, v in self.entries.items() if k not in dropped})

    def plain(self) -> dict[str, Any]:
        """Plain data under the keys as written."""
        return {written: plain(node) for written, node in self.entries.values()}


Node = Value | Tree


def canonical(key: str) -> str:
    """The one spelling under which keys are compared."""
    return key.replace("_", "-")


def plain(node: Node) -> Any:
    """Data without origins."""
    return node.plain() if isinstance(node, Tree) else node.data


def tree(origin: Origin, items: list[tuple[str, Node]]) -> Tree:
    """A mapping from keys in the order written. Raises `SettingError` when one is given twice."""
    entries: dict[str, tuple[str, Node]] = {}
    for written, node in items:
        key = canonical(written)
        if key in entries:
            first, other = entries[key]
            also = "" if first == written else f" as '{first}'"
            raise SettingError(
                f"{node.origin}: key '{written}' is given twice; it stands at {other.origin}{also}. Keep one."
            )
        entries[key] = (written, node)
    return Tree(origin, entries)


def from_plain(data: Any, origin: Origin, raw: str | None = None) -> Node:
    """A node from plain data, all of one origin."""
    if isinstance(data, Mapping):
        return tree(origin, [(str(k), from_plain(v, origin)) for k, v in data.items()])
    return Value(data, origin, raw)


def at_path(path: list[str], node: Node) -> Node:
    """A tree that holds `node` at `path`."""
    for key in reversed(path):
        node = Tree(node.origin, {canonical(key): (key, node)})
    return node


def merge(high: Node | None, low: Node | None) -> Node | None:
    """Both together, key by key at any depth; where both have a value, or differ in kind, `high` wins."""
    if high is None or low is None:
        return low if high is None else high
    if not isinstance(high, Tree) or not isinstance(low, Tree):
        return high
    entries = dict(low.entries)
    for key, (written, node) in high.entries.items():
        below = low.entries.get(key)
        merged = merge(node, below[1] if below else None)
        assert merged is not None
        entries[key] = (written, merged)
    return Tree(high.origin, entries)


def relabel(node: Node, layer: Layer, prefix: str) -> Node:
    """The same values in another layer, with `prefix` before their place."""
    origin = replace(node.origin, layer=layer, place=f"{prefix}{node.origin.place}")
    if isinstance(node, Value):
        return replace(node, origin=origin)
    return Tree(origin, {k: (written, relabel(n, layer, prefix)) for k, (written, n) in node.entries.items()})
