"""Shows settings with their origins: what `--dry-run` prints."""

from __future__ import annotations

import json
from typing import Any

from core.graph.config.origin import Layer
from core.graph.config.settings import Setting, Settings
from core.graph.plan import Plan

HIDDEN = "(hidden)"


def as_table(plan: Plan, settings: Settings) -> str:
    """One line a value: key, value, origin; what was set before what is default."""
    rows: list[tuple[str, str, str]] = []
    for name in reversed(list(plan.nodes)):
        rows.append((name, "", ""))
        values = sorted(settings.services[name].values, key=lambda v: (v.origin.layer == Layer.DEFAULT, v.key))
        rows.extend((f"  {value.key}", _shown(value), str(value.origin)) for value in values)
    if settings.unused_common:
        rows.append(("Common, taken by no service", "", ""))
        rows.extend((f"  {value.key}", _shown(value), str(value.origin)) for value in settings.unused_common)
    first = min(48, max(len(row[0]) for row in rows))
    second = min(48, max(len(row[1]) for row in rows))
    return "\n".join(f"{key:<{first}}  {value:<{second}}  {origin}".rstrip() for key, value, origin in rows)


def as_json(plan: Plan, settings: Settings) -> str:
    """The same for programs: services in start order, each value with its origin and layer."""
    services: dict[str, Any] = {}
    for name in plan.nodes:
        services[name] = {
            value.key: {
                "value": HIDDEN if _is_hidden(value) else value.value,
                "origin": str(value.origin),
                "layer": value.origin.layer.name.lower().replace("_", " "),
            }
            for value in settings.services[name].values
        }
    document = {
        "graph": plan.name,
        "entry": plan.entry,
        "namespace": settings.namespace,
        "dependencies": {name: [d for d in node.dependencies.values() if d] for name, node in plan.nodes.items()},
        "services": services,
        "unused_common": {value.key: value.value for value in settings.unused_common},
    }
    return json.dumps(document, indent=2, ensure_ascii=False, default=str)


def _shown(value: Setting) -> str:
    return HIDDEN if _is_hidden(value) else json.dumps(value.value, ensure_ascii=False, default=str)


def _is_hidden(value: Setting) -> bool:
    return value.secret and bool(value.value)
