"""`depends(Other)`: the edges that a service may have. Links choose among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

if TYPE_CHECKING:
    from core.graph.service import Service

T = TypeVar("T")


class Depends(Generic[T]):
    """An edge to another service. On the class it is itself; on an instance, a client of the service, or None.

    The client is typed as the service, because its endpoint methods are called like the service's own.
    """

    def __init__(self, target: type[T], *, optional: bool = False) -> None:
        self.target = target
        self.optional = optional
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T | None: ...
    def __get__(self, instance: object | None, owner: type) -> Self | T | None:
        if instance is None:
            return self
        return cast("T | None", cast("Service", instance).context.dependency(self.name))


def depends(target: type[T], *, optional: bool = False) -> Depends[T]:
    """Declare that this service may call `target`.

    A graph without links keeps every declared edge. With links, an edge that is not linked reads as None. `optional`
    edges may all be pruned; of the others at least one must be left.
    """
    return Depends(target, optional=optional)


def dependencies_of(cls: type) -> dict[str, Depends[Any]]:
    """Declared edges by attribute name, inherited ones included."""
    found: dict[str, Depends[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Depends):
                found[name] = value
            else:
                found.pop(name, None)
    return found
