"""`dynamo graph`: the services of a graph, drawn, and the keys that each understands."""

from __future__ import annotations

import json

import click

from core.field_docs import field_docs
from core.graph import load_plan
from core.graph.config.schema import in_words, keys_of
from core.graph.draw import as_mermaid, as_text
from core.graph.plan import Plan
from core.graph.service import config_of


@click.command(name="graph")
@click.argument("target", metavar="GRAPH")
@click.option("--mermaid", is_flag=True, help="Print a Mermaid diagram.")
@click.option("--keys", is_flag=True, help="List every key that the services understand.")
def command(target: str, mermaid: bool, keys: bool) -> None:
    """Draw GRAPH, such as graphs.agg or graphs.agg:Processor."""
    plan = load_plan(target)
    click.echo(as_mermaid(plan) if mermaid else as_text(plan))
    if keys:
        click.echo("\n" + keys_table(plan))


def keys_table(plan: Plan) -> str:
    """Every key of every service: type, default and meaning."""
    lines = []
    for name, node in reversed(list(plan.nodes.items())):
        struct = config_of(node.cls)
        docs = field_docs(struct)
        lines.append(f"{name}:")
        for key in keys_of(struct).values():
            default = json.dumps(key.default, ensure_ascii=False, default=list)
            lines.append(f"  {key.name}: {in_words(key.type)}; default {default}")
            if doc := docs.get(key.attribute):
                lines.append(f"      {doc}")
    return "\n".join(lines)
