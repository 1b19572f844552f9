"""From links to what runs: pruned edges, the closure of the entry service, and the order of starting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from core.graph.depends import dependencies_of
from core.graph.errors import GraphError
from core.graph.links import Graph
from core.graph.service import ServiceSpec, is_service, spec_of


@dataclass(frozen=True)
class Node:
    """One service of a served graph."""

    cls: type
    spec: ServiceSpec
    dependencies: Mapping[str, str | None]
    """Attribute name to the name of the service it calls; None for a pruned edge."""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Plan:
    """A graph that can be served."""

    name: str
    entry: str
    nodes: Mapping[str, Node]
    """Services by name, in start order: a service comes after all it depends on, the entry last."""
    catalogue: Mapping[str, type]
    """Every service that could be part of such a graph, by name: what configuration may speak of."""

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a dependency is missing or starts too late."""
        started: set[str] = set()
        for node in self.nodes.values():
            assert all(d is None or d in started for d in node.dependencies.values()), node.name
            started.add(node.name)
        assert list(self.nodes)[-1] == self.entry


def plan(graph: Graph, entry: type | None = None) -> Plan:
    """Resolve a graph from its entry service, by default the first of its chain.

    A service that appears in any link keeps only its linked edges; without a link all declared edges are kept.
    Raises `GraphError` for everything that could not be served, in one sentence.
    """
    linked = _linked(graph)
    if entry is None:
        entry = _first_of_chain(graph, linked)
    spec_of(entry)
    edges: dict[type, dict[str, type | None]] = {}
    order = _start_order(entry, linked, edges)
    nodes = {spec_of(cls).name: _node(cls, edges[cls]) for cls in order}
    result = Plan(graph.name, spec_of(entry).name, nodes, _catalogue(order))
    result.check_integrity()
    return result


def _linked(graph: Graph) -> dict[type, list[type]]:
    """Linked targets of every service that appears in a link. Checks that each link was declared."""
    linked: dict[type, list[type]] = {}
    for source, target in graph.edges:
        spec_of(source)
        spec_of(target)
        linked.setdefault(source, []).append(target)
        linked.setdefault(target, [])
        declared = [d.target for d in dependencies_of(source).values()]
        if not any(issubclass(target, d) for d in declared):
            names = ", ".join(_title(d) for d in declared) or "no service"
            raise GraphError(
                f"{_title(source)} cannot be linked to {_title(target)}: it depends on {names}. "
                f"Declare the edge in {source.__name__} with depends({target.__name__}), or link another service."
            )
    return linked


def _first_of_chain(graph: Graph, linked: Mapping[type, Iterable[type]]) -> type:
    if not linked:
        raise GraphError(f"{graph.name} links no services; name its entry service, as in '{graph.name}:Frontend'.")
    targets = {target for _, target in graph.edges}
    first = [cls for cls in linked if cls not in targets]
    if len(first) == 1:
        return first[0]
    if not first:
        raise GraphError(f"The links of {graph.name} go in a circle: {_circle(linked)}. A graph needs a first service.")
    names = " and ".join(_title(cls) for cls in first)
    raise GraphError(
        f"{graph.name} has {len(first)} first services, {names}; choose one, as in '{graph.name}:{_title(first[0])}'."
    )


def _circle(linked: Mapping[type, Iterable[type]]) -> str:
    path: list[type] = [next(iter(linked))]
    while (following := next(iter(linked[path[-1]]))) not in path:
        path.append(following)
    return _arrows([*path[path.index(following) :], following])


def _start_order(
    entry: type, linked: Mapping[type, list[type]], edges: dict[type, dict[str, type | None]]
) -> list[type]:
    """Depth-first, dependencies first. Fills `edges` with every visited service's kept and pruned edges."""
    order: list[type] = []
    path: list[type] = []
    names: dict[str, type] = {}

    def visit(cls: type) -> None:
        if cls in path:
            raise GraphError(
                f"Services depend on each other in a circle: {_arrows([*path[path.index(cls) :], cls])}. "
                "Leave one of these edges out with link()."
            )
        if cls in edges:
            return
        other = names.setdefault(_title(cls), cls)
        if other is not cls:
            raise GraphError(
                f"Two services are named {_title(cls)}: {_where(other)} and {_where(cls)}; "
                'give one another name with @service(name="...").'
            )
        path.append(cls)
        edges[cls] = _kept_edges(cls, linked)
        for target in edges[cls].values():
            if target is not None:
                visit(target)
        path.pop()
        order.append(cls)

    visit(entry)
    return order


def _kept_edges(cls: type, linked: Mapping[type, list[type]]) -> dict[str, type | None]:
    spec = spec_of(cls)
    if spec.abstract:
        raise GraphError(
            f"{spec.name} is abstract and cannot be served; use link with a concrete implementation, "
            f"a subclass of {cls.__name__}."
        )
    declared = dependencies_of(cls)
    kept: dict[str, type | None] = {}
    for attribute, dependency in declared.items():
        if not is_service(dependency.target):
            what = getattr(dependency.target, "__name__", repr(dependency.target))
            raise GraphError(
                f"{spec.name}.{attribute} depends on {what}, which is not a service; "
                "decorate its class with @service()."
            )
        if cls in linked:
            chosen = [t for t in linked[cls] if issubclass(t, dependency.target)]
            if len(chosen) > 1:
                names = " and ".join(_title(t) for t in chosen)
                raise GraphError(f"{spec.name}.{attribute} is one service and was linked to {names}; link one of them.")
            kept[attribute] = chosen[0] if chosen else None
        else:
            kept[attribute] = dependency.target
    needed = {a: d.target for a, d in declared.items() if not d.optional}
    if needed and not any(kept[a] for a in needed):
        names = " or ".join(_title(t) for t in needed.values())
        raise GraphError(f"{spec.name} cannot work without {names}: link it, as in {cls.__name__}.link(...).")
    return kept


def _node(cls: type, edges: Mapping[str, type | None]) -> Node:
    return Node(cls, spec_of(cls), {a: None if t is None else _title(t) for a, t in edges.items()})


def _catalogue(served: Iterable[type]) -> dict[str, type]:
    """The served services and all that they declare, directly or not. A served subclass stands for its base."""
    found: dict[str, type] = {}
    stack = list(reversed(list(served)))
    while stack:
        cls = stack.pop()
        if is_service(cls) and _title(cls) not in found:
            found[_title(cls)] = cls
            stack.extend(d.target for d in reversed(dependencies_of(cls).values()))
    return found


def _title(cls: type) -> str:
    return spec_of(cls).name if is_service(cls) else cls.__name__


def _where(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _arrows(path: Iterable[type]) -> str:
    return " > ".join(_title(cls) for cls in path)
