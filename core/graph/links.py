"""Where links are recorded: with the module that wrote them, or with a graph that is being built.

Nothing is process-wide. A module's links live in its own namespace, so two graph modules in one process never see each
other's edges, and neither do two `Graph.building()` blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import FrameType, ModuleType
from typing import Any

_MODULE_KEY = "__dynamo_graph__"


class Graph:
    """Services and the links between them, in the order in which they were written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._edges: dict[tuple[type, type], None] = {}

    @property
    def edges(self) -> list[tuple[type, type]]:
        """The links, each once."""
        return list(self._edges)

    def add(self, source: type, target: type) -> None:
        """Record a link. Writing it twice changes nothing."""
        self._edges[source, target] = None

    @staticmethod
    def building(name: str = "graph") -> AbstractContextManager[Graph]:
        """`with Graph.building() as graph:` gives every link written in the block to `graph`.

        Links at the top level of another module, which is imported inside the block, still belong to that module.
        """
        return _building(Graph(name), sys._getframe(1).f_globals)

    @staticmethod
    def of(module: ModuleType) -> Graph | None:
        """The graph that a module's own code wrote; None when it wrote no link."""
        graph = vars(module).get(_MODULE_KEY)
        return graph if isinstance(graph, Graph) else None


_scope: ContextVar[tuple[Graph, dict[str, Any]] | None] = ContextVar("dynamo_graph_being_built", default=None)


@contextmanager
def _building(graph: Graph, module: dict[str, Any]) -> Iterator[Graph]:
    token = _scope.set((graph, module))
    try:
        yield graph
    finally:
        _scope.reset(token)


def record_link(source: type, target: type, caller: FrameType) -> None:
    """Record a link written by the code of `caller`."""
    module = caller.f_globals
    scope = _scope.get()
    if scope is not None and (caller.f_code.co_name != "<module>" or module is scope[1]):
        scope[0].add(source, target)
        return
    graph: Graph = module.setdefault(_MODULE_KEY, Graph(str(module.get("__name__", "graph"))))
    graph.add(source, target)
