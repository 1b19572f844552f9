"""`dynamo config`: settings of a running deployment that may change while it serves. A change holds until it stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from core.cli.server import Server
from core.components.prefill_messages import PrefillSettings

F = TypeVar("F", bound=Callable[..., Any])

PATH = "/prefill/settings"


@click.group(name="config")
def command() -> None:
    """Show and change settings of a running deployment; the next request is served by them.

    They are those of disaggregated prefill: where a prompt is prefilled, and when.
    """


def _deployment(function: F) -> F:
    """The options that say where the deployment is."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--api-key", envvar="DYNAMO_API_KEY", help="Where the deployment wants one; or DYNAMO_API_KEY."),
        click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The deployment."),
    ):
        function = option(function)
    return function


@command.command(name="get")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@_deployment
def get(keys: Sequence[str], url: str, api_key: str | None, as_json: bool) -> None:
    """Print settings that can be changed, all of them or some."""
    _print(_ask(url, api_key, None), [key.replace("_", "-") for key in keys], as_json)


@command.command(name="set")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE...")
@_deployment
def set_(changes: Sequence[str], url: str, api_key: str | None, as_json: bool) -> None:
    """Change settings, as in: dynamo config set conditional-disagg=true max-local-prefill-length=512"""
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not (key and equals and value):
            raise click.UsageError(f"'{change}' is no change; write KEY=VALUE.")
        values[key.replace("_", "-")] = _value(value)
    _print(_ask(url, api_key, values), list(values), as_json)


@command.command(name="reset")
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@_deployment
def reset(keys: Sequence[str], url: str, api_key: str | None, as_json: bool) -> None:
    """Take changes back, all of them or some: what was configured at the start is in force again."""
    chosen = [key.replace("_", "-") for key in keys] or list(_ask(url, api_key, None).settings)
    _print(_ask(url, api_key, dict.fromkeys(chosen)), chosen, as_json)


def _ask(url: str, key: str | None, values: dict[str, Any] | None) -> PrefillSettings:
    server = Server(url, key)
    return server.decode(server.call(PATH, values), PrefillSettings)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print(found: PrefillSettings, keys: Sequence[str], as_json: bool) -> None:
    unknown = [key for key in keys if key not in found.settings]
    if unknown:
        raise click.UsageError(f"'{unknown[0]}' is no such setting; there are {', '.join(found.settings)}.")
    chosen = {key: found.settings[key] for key in keys or found.settings}
    if as_json:
        click.echo(json.dumps(chosen, indent=2))
        return
    width = max(len(key) for key in chosen)
    for key, value in chosen.items():
        before = found.configured[key]
        changed = "" if value == before else f"   changed, configured is {json.dumps(before)}"
        click.echo(f"{key:<{width}}  {json.dumps(value)}{changed}")
