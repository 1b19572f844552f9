"""Everything that a graph author or an engine author imports.

The engine contract is at hand at once; graphs and components are imported when they are first asked for, so that the
command line and engine plug-ins start without them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from core.engine import EngineHost, EngineRegistry, InvalidAdapter, Source, hookimpl
from core.messages import *  # noqa: F403 - the messages are the public vocabulary
from core.messages import __all__ as _messages

if TYPE_CHECKING:
    from core.components import Frontend, PrefillWorker, Processor, Router, Worker, engine_aliases
    from core.graph import (
        Deployment,
        DeploymentFailed,
        Graph,
        GraphError,
        Preflight,
        Service,
        ServiceConfig,
        ServiceContext,
        SettingError,
        client_of,
        depends,
        endpoint,
        load_plan,
        load_settings,
        on_drain,
        on_start,
        on_stop,
        plan,
        service,
    )
    from core.graph.config import Follows, Needs, Secret
    from core.runtime import Address, LocalRuntime

__all__ = [
    *_messages,
    "Address",
    "Deployment",
    "DeploymentFailed",
    "EngineHost",
    "EngineRegistry",
    "Follows",
    "Frontend",
    "Graph",
    "GraphError",
    "InvalidAdapter",
    "LocalRuntime",
    "Needs",
    "Preflight",
    "PrefillWorker",
    "Processor",
    "Router",
    "Secret",
    "Service",
    "ServiceConfig",
    "ServiceContext",
    "SettingError",
    "Source",
    "Worker",
    "client_of",
    "depends",
    "endpoint",
    "engine_aliases",
    "hookimpl",
    "load_plan",
    "load_settings",
    "on_drain",
    "on_start",
    "on_stop",
    "plan",
    "service",
]

_LATER = ("core.graph", "core.graph.config", "core.runtime", "core.components")


def __getattr__(name: str) -> Any:
    for module in _LATER if name in __all__ else ():
        value = getattr(importlib.import_module(module), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module 'dynamo' has no attribute '{name}'")
