"""`dynamo`: finds the command, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import click

from core import __version__
from core.messages import ConfigError, DynamoError

_COMMANDS = {
    "serve": "Serve a graph: an OpenAI-compatible endpoint on one line.",
    "engines": "List the engines, what each can do, and why one cannot run here.",
    "config": "Show and change settings of a running deployment.",
    "graph": "Draw a graph and list the keys of its services.",
    "route": "Ask a running deployment where a prompt would go, and why.",
}


class _Commands(click.Group):
    """Imports a command's module when the command runs, so that `--help` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = importlib.import_module(f"core.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
        if args[0] not in _COMMANDS and near:
            raise click.UsageError(f"No such command '{args[0]}'; did you mean {near[0]}?", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="dynamo")
def cli() -> None:
    """Serve language models in any of four modes on any engine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Gives its exit code: 0, 1 for a failure, 2 for a mistake in the command or configuration."""
    try:
        code = cli.main(args=None if arguments is None else list(arguments), prog_name="dynamo", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        return 2
    except click.ClickException as error:
        _say(f"Error: {error.format_message()}")
        return 2
    except ConfigError as error:
        _say(f"Error: {error}")
        return 2
    except DynamoError as error:
        _say(f"Error: {error}")
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output left; there is nobody to tell
        return 1
    return code if isinstance(code, int) else 0


def _say(text: str) -> None:
    click.echo(text, err=True)
