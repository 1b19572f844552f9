"""`dynamo engines`: what is installed, what it can do, and what is missing. Imports no engine."""

from __future__ import annotations

import json
from typing import Any

import click
import msgspec

from core.engine import Adapter, EngineRegistry


@click.command(name="engines")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List every engine adapter: version found, tested range, modes, rendezvous, devices, and why one cannot run."""
    registry = EngineRegistry()
    engines = [_facts(adapter) for _, adapter in sorted(registry.adapters.items())]
    broken = [
        {"name": b.source.entry_point, "package": b.source.distribution, "error": b.error} for b in registry.broken
    ]
    if as_json:
        click.echo(json.dumps({"engines": engines, "broken": broken}, indent=2))
        return
    click.echo("\n\n".join(_paragraph(engine) for engine in engines) or "No engine is installed.")
    for plugin in broken:
        click.echo(f"\n{plugin['name']}  refused\n  {plugin['error']}")


def _facts(adapter: Adapter) -> dict[str, Any]:
    description, can = adapter.description, adapter.description.capabilities
    return {
        "name": description.name,
        "summary": description.summary,
        "plugin": adapter.source.distribution,
        "package": description.package,
        "version": adapter.version,
        "tested": description.tested,
        "inside_tested_range": adapter.tested,
        "available": adapter.unavailable is None,
        "unavailable": adapter.unavailable,
        "install": description.install,
        "caution": adapter.caution,
        "roles": sorted(can.roles),
        "modes": _modes(adapter),
        "rendezvous": sorted(can.rendezvous),
        "devices": list(can.devices),
        "model_required": description.model_required,
        "capabilities": msgspec.to_builtins(can, order="deterministic"),
    }


def _modes(adapter: Adapter) -> list[str]:
    """Graphs that the engine can serve, by its roles and KV events."""
    can = adapter.description.capabilities
    modes = []
    if "aggregated" in can.roles:
        modes += ["agg", "agg_router"]
    if {"prefill", "decode"} <= set(can.roles):
        modes += ["disagg", "disagg_router"]
    return modes


def _paragraph(engine: dict[str, Any]) -> str:
    if engine["package"] is None:
        version = "needs no package"
    elif engine["version"] is None:
        version = f"{engine['package']} is not installed"
    else:
        inside = "inside" if engine["inside_tested_range"] else "OUTSIDE"
        tested = f", {inside} the tested range {engine['tested']}" if engine["tested"] else ""
        version = f"{engine['package']} {engine['version']}{tested}"
    lines = [
        f"{engine['name']}  {'available' if engine['available'] else 'not available'}",
        f"  {engine['summary']}",
        f"  package     {version}",
        f"  modes       {', '.join(engine['modes']) or 'none'}",
        f"  roles       {', '.join(engine['roles'])}",
        f"  rendezvous  {', '.join(engine['rendezvous']) or 'none: cannot be disaggregated'}",
        f"  devices     {', '.join(engine['devices'])}",
        f"  plug-in     {engine['plugin']}",
    ]
    if engine["unavailable"]:
        lines.append(f"  why not     {engine['unavailable']}")
    if engine["caution"]:
        lines.append(f"  caution     {engine['caution']}")
    return "\n".join(lines)
