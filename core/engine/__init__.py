"""The engine contract: hookspecs, registry, validation and the host that runs one adapter."""

from core.engine.hookspecs import EngineSpec, hookimpl, hookspec
from core.engine.host import EngineHost
from core.engine.registry import Adapter, EngineRegistry
from core.engine.validate import InvalidAdapter, Source

__all__ = [
    "Adapter",
    "EngineHost",
    "EngineRegistry",
    "EngineSpec",
    "InvalidAdapter",
    "Source",
    "hookimpl",
    "hookspec",
]
