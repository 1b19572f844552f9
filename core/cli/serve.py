"""`dynamo serve`: reads the command, resolves graph and configuration, and runs them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from core.components import engine_aliases
from core.engine import EngineRegistry
from core.graph import load_plan, load_settings
from core.graph.config import split_arguments
from core.graph.config.report import as_json, as_table
from core.resources import shipped

_OVERRIDES = "dynamo.overrides"


class _Serve(click.Command):
    """Takes overrides of any service out of the arguments before click sees the rest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        others, overrides = split_arguments(args)
        ctx.meta[_OVERRIDES] = overrides
        return super().parse_args(ctx, [a.replace("--dry-run=", "--dry-run-as=", 1) for a in others])


def _once(ctx: click.Context, parameter: click.Parameter, values: Sequence[Any]) -> Any:
    if len(values) > 1:
        option = parameter.opts[-1]
        given = " and ".join(str(v) for v in values)
        raise click.UsageError(f"{option} is given {len(values)} times ({given}); keep one.", ctx)
    return values[0] if values else None


@click.command(
    name="serve",
    cls=_Serve,
    epilog="Any key of any service can be set: --Service.key=value, as in --Worker.ServiceArgs.workers=2 or "
    "--Worker.engine-args.swap-space=4. 'dynamo graph GRAPH --keys' lists them.",
)
@click.argument("target", metavar="GRAPH")
@click.option("-f", "--config-file", multiple=True, callback=_once, help="YAML file with a section for each service.")
@click.option("--engine", multiple=True, callback=_once, help="Engine of Worker and PrefillWorker.")
@click.option("--model", multiple=True, callback=_once, help="Model folder or hub id, of every service that has one.")
@click.option("--host", multiple=True, callback=_once, help="Address to listen on; 0.0.0.0 for all.")
@click.option("-p", "--port", multiple=True, type=int, callback=_once, help="Port to listen on.")
@click.option("--dry-run", is_flag=True, help="Print every setting and where it comes from, then stop.")
@click.option("--dry-run-as", type=click.Choice(["table", "json"]), hidden=True)
@click.option(
    "--drain-timeout", type=click.FloatRange(min=0), default=60.0, show_default=True,
    help="Seconds that running requests have to finish after Ctrl-C.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", show_default=True,
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    target: str,
    config_file: str | None,
    engine: str | None,
    model: str | None,
    host: str | None,
    port: int | None,
    dry_run: bool,
    dry_run_as: str | None,
    drain_timeout: float,
    log_level: str,
) -> int:
    """Serve GRAPH, such as graphs.agg or my_module:MyService.

    --dry-run=json prints the settings as JSON.
    """
    engines = EngineRegistry()
    plan = load_plan(target)
    shortcuts = {"engine": engine, "model": model, "host": host, "port": port}
    settings = load_settings(
        plan,
        file=None if config_file is None else _config_path(config_file),
        overrides=ctx.meta[_OVERRIDES],
        shortcuts={key: value for key, value in shortcuts.items() if value is not None},
        aliases=engine_aliases(engines.adapters),
    )
    if dry_run or dry_run_as:
        click.echo(as_json(plan, settings) if dry_run_as == "json" else as_table(plan, settings))
        return 0
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    from core.cli.serving import serve  # uvloop, only when something is really served

    return serve(plan, settings, engines, drain_timeout=drain_timeout)


def _config_path(given: str) -> Path:
    """The file as given, or the shipped one of that name when the working directory has none."""
    path = Path(given)
    if not path.exists() and not path.is_absolute():
        try:
            return shipped(given)
        except FileNotFoundError:
            pass
    return path
