"""Everything that a graph author or an engine author imports."""

from core.engine import EngineHost, EngineRegistry, InvalidAdapter, Source, hookimpl
from core.messages import *  # noqa: F403 - the messages are the public vocabulary
from core.messages import __all__ as _messages

__all__ = [*_messages, "EngineHost", "EngineRegistry", "InvalidAdapter", "Source", "hookimpl"]
