"""Everything in one process and one event loop: no server, no serialization, no copies."""

from core.runtime.local.runtime import LocalRuntime

__all__ = ["LocalRuntime"]
