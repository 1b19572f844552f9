"""`dynamo route`: what the Routers of a running deployment know, and where a prompt would go. Nothing is generated."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from core.cli.server import Server
from core.components.router_messages import Routed, RoutersState, RouterState
from core.routing import Reason

WHY = {
    Reason.ONLY: "it is the only one",
    Reason.HIT: "it holds the most of the prompt, as blocks count",
    Reason.LOAD: "another holds more of the prompt, and is too busy for that to pay",
    Reason.COLD: "nobody holds any of the prompt, and this one is the least busy",
    Reason.SESSION: "the session was there before",
    Reason.TURN: "it is its turn",
    Reason.RANDOM: "by chance",
    Reason.LEAST_LOADED: "it has the least work ahead",
    Reason.TWO_CHOICES: "it is the less busy of two picked by chance",
}


@click.command(name="route")
@click.option("--explain", "prompt", metavar="PROMPT", help="Say where PROMPT would go now; '-' reads it from stdin.")
@click.option("--completion", is_flag=True, help="PROMPT is plain text, not what a user says in a chat.")
@click.option("--messages", type=click.Path(dir_okay=False, path_type=Path), help="JSON file with a conversation.")
@click.option("--session", help="Whose prompt it is, for session affinity.")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The deployment.")
@click.option("--api-key", envvar="DYNAMO_API_KEY", help="Where the deployment wants one; or DYNAMO_API_KEY.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    prompt: str | None,
    completion: bool,
    messages: Path | None,
    session: str | None,
    url: str,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Ask a running deployment about routing: without an option, its Routers, workers and loads.

    --explain names the worker that a prompt would be sent to now, and why, with every candidate's score.
    """
    server = Server(url, api_key)
    if prompt is None and messages is None:
        if completion or session is not None:
            raise click.UsageError("--completion and --session belong to --explain or --messages.")
        raw = server.call("/routing/state", None)
        click.echo(_pretty(raw) if as_json else states(server.decode(raw, RoutersState)))
        return
    if prompt is not None and messages is not None:
        raise click.UsageError("--explain and --messages are both given; keep one.")
    body = _body(prompt, messages, completion) | ({} if session is None else {"session": session})
    raw = server.call("/routing/explain", body)
    click.echo(_pretty(raw) if as_json else explanation(server.decode(raw, Routed)))


def explanation(routed: Routed) -> str:
    """A decision as a person reads it."""
    chosen = (routed.worker, routed.rank)
    lines = [
        f"{_target(*chosen)}: {WHY[routed.reason]} ({routed.reason})",
        f"{routed.prompt_tokens} prompt tokens, {routed.hit_tokens:g} of them cached there; "
        f"policy {routed.policy} of {routed.router}, blocks of {routed.block_size} tokens",
        "",
    ]
    rows: list[tuple[str, ...]] = [("", "worker", "cached blocks", "work ahead", "score")]
    for one in routed.candidates:
        mark = ">" if (one.worker, one.rank) == chosen else ""
        rows.append((mark, _target(one.worker, one.rank), *map(_figure, (one.hit_blocks, one.load, one.score))))
    return "\n".join(lines + _table(rows))


def states(known: RoutersState) -> str:
    """Every Router's knowledge as a person reads it."""
    return "\n\n".join(_state(router) for router in known.routers) or "No Router is live now."


def _state(state: RouterState) -> str:
    routing = state.routing
    decisions = ", ".join(f"{reason} {count}" for reason, count in sorted(routing.decisions.items())) or "none yet"
    lines = [
        f"{state.router}: policy {routing.policy}, blocks of {state.block_size} tokens, "
        f"{routing.indexed_blocks} in the index; {routing.in_flight} requests in flight, {routing.queued} queued"
        + (f"; {state.peers} other Routers" if state.peers else ""),
        f"decisions: {decisions}",
        "",
    ]
    rows = [("worker", "requests", "to prefill", "resident", "used", "blocks", "events")]
    for one in routing.workers:
        events = f"{one.event_lag * 1e3:.1f} ms behind" if one.events_synced else "not in step"
        rows.append(
            (
                _target(one.worker, one.rank),
                str(one.requests),
                str(one.prefill_tokens),
                str(one.resident_tokens),
                f"{one.utilization:.0%}",
                str(one.indexed_blocks),
                events,
            )
        )
    lines += _table(rows)
    lines += [f"nothing is sent to {worker}: {why}" for worker, why in state.refused.items()]
    return "\n".join(lines)


def _body(prompt: str | None, messages: Path | None, completion: bool) -> dict[str, Any]:
    if messages is not None:
        if completion:
            raise click.UsageError("--completion belongs to --explain; a conversation is always a chat.")
        return {"messages": _conversation(messages)}
    text = sys.stdin.read() if prompt == "-" else prompt
    return {"prompt": text} if completion else {"messages": [{"role": "user", "content": text}]}


def _conversation(file: Path) -> Any:
    """A list of messages, or the body of a chat request that has them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise click.UsageError(f"{file} is not JSON: {error}.") from error
    return found.get("messages") if isinstance(found, dict) else found


def _pretty(raw: bytes) -> str:
    return msgspec.json.format(raw, indent=2).decode()


def _target(worker: str, rank: int) -> str:
    return f"{worker}/{rank}" if rank else worker


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns in line; the last ones are figures and stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = 2 if rows[0][0] == "" else 1
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
