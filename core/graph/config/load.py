"""Collects the layers of a command: overrides, shortcuts, environment, file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.graph.config.origin import Layer, Origin, Tree, from_plain
from core.graph.config.overrides import override_tree
from core.graph.config.resolve import Alias, resolve, settings_for
from core.graph.config.schema import keys_of
from core.graph.config.settings import Settings
from core.graph.config.yaml_source import load_file, load_text
from core.graph.errors import SettingError
from core.graph.plan import Plan
from core.graph.service import config_of

VARIABLE = "DYN_DEPLOYMENT_CONFIG"


def load_settings(
    plan: Plan,
    *,
    file: Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    shortcuts: Mapping[str, Any] | None = None,
    aliases: Mapping[str, Alias] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of a graph's services.

    `overrides` are (dotted path, text) as from `split_arguments`; `shortcuts` set a key on every served service that
    has it. Raises `SettingError` for whatever cannot be used or would have no effect in this graph.
    """
    environment = os.environ if environment is None else environment
    layers = [override_tree(overrides), _shortcut_tree(plan, shortcuts or {})]
    if text := environment.get(VARIABLE):
        layers.append(load_text(text, VARIABLE, Layer.ENVIRONMENT))
    if file is not None:
        layers.append(load_file(file))
    return settings_for(plan, resolve(plan.catalogue, layers, aliases))


def _shortcut_tree(plan: Plan, shortcuts: Mapping[str, Any]) -> Tree:
    entries: dict[str, Any] = {}
    for key, value in shortcuts.items():
        takers = [name for name, node in plan.nodes.items() if key in keys_of(config_of(node.cls))]
        if not takers:
            raise SettingError(
                f"--{key}: no service of {plan.name} has the key '{key}'; it has {', '.join(plan.nodes)}."
            )
        origin = Origin(Layer.SHORTCUT, f"--{key}")
        for name in takers:
            entries.setdefault(name, {})[key] = from_plain(value, origin, str(value))
    start = Origin(Layer.SHORTCUT, "command line")
    sections = {
        name: (name, Tree(next(iter(keys.values())).origin, {k: (k, n) for k, n in keys.items()}))
        for name, keys in entries.items()
    }
    return Tree(start, sections)
