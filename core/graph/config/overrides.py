"""Overrides on the command line: `--Service.key=value`, `--Service.key value`, `--Service.key = value`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from core.graph.config.origin import Layer, Node, Origin, Tree, Value, at_path, canonical, from_plain, merge
from core.graph.config.scalar import parse_override
from core.graph.errors import SettingError

_OVERRIDE = re.compile(r"--(?P<path>[A-Za-z][\w-]*(?:\.[^=.]*)+)(?P<rest>=.*)?", re.DOTALL)
_NUMBER = re.compile(r"-\.?[0-9].*")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separate overrides from everything else, which keeps its order. Gives (others, [(path, text)]).

    Raises `SettingError` for an override without a value.
    """
    others: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*others, token, *rest], overrides
        match = _OVERRIDE.fullmatch(token)
        if match is None:
            others.append(token)
            continue
        path = match["path"]
        if match["rest"] is not None:
            text = match["rest"][1:]
        elif rest and rest[0] == "=":
            rest.pop(0)
            text = _take(path, rest)
        elif rest and rest[0].startswith("="):
            text = rest.pop(0)[1:]
        else:
            text = _take(path, rest)
        overrides.append((path, text))
    return others, overrides


def override_tree(overrides: Sequence[tuple[str, str]]) -> Tree:
    """All overrides as one tree. Raises `SettingError` when a key is given twice or a path is not well-formed."""
    result: Node = Tree(Origin(Layer.COMMAND_LINE, "command line"), {})
    for path, text in overrides:
        keys = path.split(".")
        if not all(keys):
            raise SettingError(f"--{path}: a name is missing between the dots; write --Service.key=value.")
        _refuse_twice(result, keys, path)
        origin = Origin(Layer.COMMAND_LINE, f"--{path}")
        merged = merge(at_path(keys, _node(keys, text, origin)), result)
        assert merged is not None
        result = merged
    assert isinstance(result, Tree)
    return result


def _node(keys: Sequence[str], text: str, origin: Origin) -> Node:
    if "envs" in keys[1:-1]:
        return Value(text, origin, text)
    return from_plain(parse_override(text), origin, text)


def _take(path: str, rest: list[str]) -> str:
    if not rest or (rest[0].startswith("-") and not _NUMBER.fullmatch(rest[0])):
        raise SettingError(f"--{path} has no value; write --{path}=VALUE.")
    return rest.pop(0)


def _refuse_twice(found: Node, keys: Sequence[str], path: str) -> None:
    for key in keys:
        below = found.get(key) if isinstance(found, Tree) else None
        if below is None:
            if isinstance(found, Value):
                raise SettingError(f"--{path} and {found.origin} contradict each other; keep one.")
            return
        found = below
    same = isinstance(found, Value) and canonical(found.origin.place) == canonical(f"--{path}")
    verb = "is given twice" if same else f"and {found.origin} contradict each other"
    raise SettingError(f"--{path} {verb}; keep one.")
