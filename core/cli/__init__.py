"""The command line. One file a command, each imported only when it is asked for."""

from core.cli.main import main

__all__ = ["main"]
