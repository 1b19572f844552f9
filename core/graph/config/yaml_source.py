"""Reads a YAML document into a tree in which every value knows its line."""

from __future__ import annotations

from pathlib import Path

import yaml

from core.graph.config.origin import Layer, Node, Origin, Tree, Value, canonical, tree
from core.graph.config.scalar import parse_scalar
from core.graph.errors import SettingError

_CORE = "tag:yaml.org,2002:"
_TAGS = frozenset(f"{_CORE}{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "value"))


def load_file(path: Path) -> Tree:
    """The document in a file. Raises `SettingError` when there is none or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"there are {', '.join(near[:8])}." if near else "check the path after -f."
        raise SettingError(f"Configuration file {path} does not exist; {hint}") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise SettingError(f"Configuration file {path} cannot be read: {error.strerror}.") from error
    return load_text(text, str(path), Layer.FILE)


def load_text(text: str, name: str, layer: Layer) -> Tree:
    """A document with services as its keys. `name` stands before the line number in every origin."""
    start = Origin(layer, f"{name}:1")
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Tree(start, {})
        node = _Reader(loader, name, layer).read(root, ())
    except yaml.MarkedYAMLError as error:
        raise SettingError(_with_caret(name, error)) from error
    except yaml.YAMLError as error:
        raise SettingError(f"{name}: not YAML: {error}.") from error
    finally:
        loader.dispose()
    if not isinstance(node, Tree):
        raise SettingError(f"{node.origin}: expected services as keys, each with its settings, found {node.data!r}.")
    return node


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, name: str, layer: Layer) -> None:
        self._loader = loader
        self._name = name
        self._layer = layer

    def read(self, node: yaml.Node, path: tuple[yaml.Node, ...]) -> Node:
        origin = self._origin(node)
        if node in path:
            raise SettingError(f"{origin}: an alias that contains itself cannot be read; write the value out.")
        path = (*path, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self.read(child, path) for child in node.value]
            return Value([i.plain() if isinstance(i, Tree) else i.data for i in items], origin)
        assert isinstance(node, yaml.ScalarNode)
        if node.tag not in _TAGS:
            raise SettingError(f"{origin}: tag '{node.tag.replace(_CORE, '!!')}' has no meaning here; leave it out.")
        implied = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
        bare = node.style is None and node.tag == implied
        if bare and not node.value:
            return Value(None, origin)
        return Value(parse_scalar(node.value) if bare else node.value, origin, node.value)

    def _mapping(self, node: yaml.MappingNode, path: tuple[yaml.Node, ...]) -> Tree:
        """Keys given twice are refused among a mapping's own; those of a merge (`<<: *base`) give way to them."""
        own = tree(self._origin(node), self._items(node, path))
        if not any(key.tag == f"{_CORE}merge" for key, _ in node.value):
            return own
        self._loader.flatten_mapping(node)
        entries = {canonical(key): (key, child) for key, child in self._items(node, path)}
        return Tree(own.origin, entries)

    def _items(self, node: yaml.MappingNode, path: tuple[yaml.Node, ...]) -> list[tuple[str, Node]]:
        items: list[tuple[str, Node]] = []
        for key, child in node.value:
            if key.tag == f"{_CORE}merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise SettingError(f"{self._origin(key)}: a key must be a word, found a list or a mapping.")
            # A key's own line, not its value's: a nested mapping begins on the line below.
            items.append((key.value, _at(self.read(child, path), self._origin(key))))
        return items

    def _origin(self, node: yaml.Node) -> Origin:
        return Origin(self._layer, f"{self._name}:{node.start_mark.line + 1}")


def _at(node: Node, origin: Origin) -> Node:
    if isinstance(node, Tree):
        return Tree(origin, node.entries)
    return Value(node.data, origin, node.raw)


def _with_caret(name: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    what = " ".join(part for part in (error.context, error.problem) if part)
    if mark is None:
        return f"{name}: not YAML: {what}."
    snippet = mark.get_snippet(indent=2, max_length=100) or ""
    return f"{name}:{mark.line + 1}: not YAML: {what}.\n{snippet}"
