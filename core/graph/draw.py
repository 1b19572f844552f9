"""Draws a graph as text or as a Mermaid diagram."""

from __future__ import annotations

from collections.abc import Mapping

from core.graph.plan import Plan


def as_text(plan: Plan, replicas: Mapping[str, int] | None = None) -> str:
    """The services below the entry as an indented tree, with their endpoints; pruned edges are named at the end."""
    lines = [plan.name]
    drawn: set[str] = set()

    def draw(name: str, indent: str, last: bool, top: bool) -> None:
        node = plan.nodes[name]
        count = (replicas or {}).get(name, 1)
        again = " (see above)" if name in drawn else ""
        endpoints = ", ".join(e.name for e in node.spec.endpoints.values())
        branch = "" if top else ("└─ " if last else "├─ ")
        times = f" x{count}" if count != 1 else ""
        lines.append(f"{indent}{branch}{name}{times}{again}{f'  [{endpoints}]' if endpoints and not again else ''}")
        if again:
            return
        drawn.add(name)
        kept = [target for target in node.dependencies.values() if target is not None]
        below = indent if top else indent + ("   " if last else "│  ")
        for position, target in enumerate(kept):
            draw(target, below, position == len(kept) - 1, False)

    draw(plan.entry, "", True, True)
    pruned = [
        f"{name}.{attribute}"
        for name, node in reversed(list(plan.nodes.items()))
        for attribute, target in node.dependencies.items()
        if target is None
    ]
    if pruned:
        lines.append(f"not linked: {', '.join(pruned)}")
    return "\n".join(lines)


def as_mermaid(plan: Plan) -> str:
    """A `graph LR` for pages that render Mermaid."""
    lines = ["graph LR", *(f"    {name}" for name in reversed(list(plan.nodes)))]
    for name, node in reversed(list(plan.nodes.items())):
        lines.extend(f"    {name} --> {target}" for target in node.dependencies.values() if target is not None)
    return "\n".join(lines)
