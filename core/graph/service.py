"""Declaring a service: `@service`, `@endpoint`, life-cycle hooks, and the base class that gives `link` its type.

    @service(workers=2, resources={"gpu": 1})
    class Echo(Service):
        class Config(ServiceConfig, frozen=True, kw_only=True):
            prefix: str = ""

        model = depends(Model)

        @on_start
        async def load(self) -> None: ...

        @endpoint()
        async def generate(self, request: str, context: RequestContext) -> AsyncIterator[str]: ...

A class without the base `Service` works too; it then has no static type for `link`, `context` and `config`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import msgspec

from core.graph.errors import GraphError
from core.graph.links import record_link

if TYPE_CHECKING:
    from core.graph.context import ServiceContext

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")

_SPEC = "__dynamo_service__"
_ENDPOINT = "__dynamo_endpoint__"
_HOOK = "__dynamo_hook__"


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Base of a service's typed configuration. Every field is one key, written with dashes or underscores."""


@dataclass(frozen=True)
class EndpointSpec:
    """One method of a service that others can call."""

    name: str
    """Name in addresses; the method's own unless `@endpoint("...")` says otherwise."""
    method: str
    takes_context: bool
    """Whether the method has a second argument, the `RequestContext`."""


@dataclass(frozen=True)
class ServiceSpec:
    """What `@service` knows of a class."""

    name: str
    abstract: bool
    dispensable: bool
    """Whether a deployment goes on when no replica is left."""
    arguments: Mapping[str, Any]
    """The values given to the decorator, by their path under `ServiceArgs` ("resources", "workers" ...)."""
    endpoints: Mapping[str, EndpointSpec]
    """By method name."""
    hooks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Method names by hook kind ("start", "drain", "stop"), base classes first."""


class Service:
    """Base of services. `context` and `config` are set before `__init__` runs, which takes no argument."""

    Config: ClassVar[type[msgspec.Struct]] = ServiceConfig
    context: ServiceContext

    @classmethod
    def link(cls, target: type[S]) -> type[S]:
        """Keep the edge from this service to `target` and drop its unlinked ones; gives `target`, so that links chain.

        The edge belongs to the module whose code calls this, or to the graph of an enclosing `Graph.building()`.
        """
        record_link(cls, target, sys._getframe(1))
        return target


def service(
    *,
    name: str | None = None,
    abstract: bool = False,
    dispensable: bool = False,
    workers: int | None = None,
    resources: Mapping[str, Any] | None = None,
    namespace: str | None = None,
    envs: Mapping[str, str] | None = None,
    process: str | None = None,
) -> Callable[[C], C]:
    """Make a class a service.

    `name` is its section in the configuration, by default the class's name. The other arguments are defaults of
    `ServiceArgs`: see `core.graph.config.service_args`. An `abstract` service declares an interface that a graph
    replaces by linking a subclass. A deployment that has lost every replica of a `dispensable` one goes on without it.
    """
    arguments = {
        "workers": workers,
        "resources": dict(resources) if resources is not None else None,
        "namespace": namespace,
        "envs": dict(envs) if envs is not None else None,
        "process": process,
    }

    def decorate(cls: C) -> C:
        title = name or cls.__name__
        config = getattr(cls, "Config", ServiceConfig)
        if not (isinstance(config, type) and issubclass(config, msgspec.Struct)):
            raise GraphError(f"Service {title}: Config must be a msgspec Struct that derives from ServiceConfig.")
        spec = ServiceSpec(
            name=title,
            abstract=abstract,
            dispensable=dispensable,
            arguments={k: v for k, v in arguments.items() if v is not None},
            endpoints=_endpoints(cls, title),
            hooks=_hooks(cls, title),
        )
        setattr(cls, _SPEC, spec)
        if not hasattr(cls, "link"):
            cls.link = Service.__dict__["link"]  # type: ignore[attr-defined]
        if not hasattr(cls, "Config"):
            cls.Config = ServiceConfig  # type: ignore[attr-defined]
        return cls

    return decorate


def is_service(cls: object) -> bool:
    """Whether `cls` itself carries `@service`; a subclass of a service is none until it is decorated too."""
    return isinstance(cls, type) and _SPEC in cls.__dict__


def spec_of(cls: object) -> ServiceSpec:
    """What `@service` recorded. Raises `GraphError` for anything else than a service."""
    if not is_service(cls):
        what = cls.__name__ if isinstance(cls, type) else repr(cls)
        raise GraphError(f"{what} is not a service; decorate its class with @service().")
    spec: ServiceSpec = cls.__dict__[_SPEC]
    return spec


def config_of(cls: type) -> type[msgspec.Struct]:
    """The typed configuration of a service class."""
    config: type[msgspec.Struct] = cls.Config  # type: ignore[attr-defined]
    return config


@overload
def endpoint(name: F) -> F: ...
@overload
def endpoint(name: str | None = None) -> Callable[[F], F]: ...
def endpoint(name: str | Callable[..., Any] | None = None) -> Any:
    """Make a method callable from other services as a stream.

    The method takes a request and, if it wants it, a `RequestContext`, and is an async generator or a plain method
    that gives an async iterator (which is then handed through without a wrapper).
    """
    if callable(name):
        return endpoint()(name)

    def decorate(method: F) -> F:
        setattr(method, _ENDPOINT, name or method.__name__)
        return method

    return decorate


def on_start(method: F) -> F:
    """Await this method after construction and before the endpoints are served: load, connect, warm up."""
    setattr(method, _HOOK, "start")
    return method


def on_drain(method: F) -> F:
    """Await this method when the service leaves the deployment in an orderly way: finish running work."""
    setattr(method, _HOOK, "drain")
    return method


def on_stop(method: F) -> F:
    """Await this method at the end, also after a failed start: free what is held. Must be idempotent."""
    setattr(method, _HOOK, "stop")
    return method


def _members(cls: type) -> dict[str, Any]:
    """Attributes by name as the class sees them, base classes first."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        members.update(vars(base))
    return members


def _endpoints(cls: type, title: str) -> dict[str, EndpointSpec]:
    found: dict[str, EndpointSpec] = {}
    taken: dict[str, str] = {}
    for attribute, method in _members(cls).items():
        address = getattr(method, _ENDPOINT, None)
        if address is None:
            continue
        if inspect.iscoroutinefunction(method):
            raise GraphError(
                f"{title}.{attribute} is a coroutine, and an endpoint is a stream: use 'yield', "
                "or a plain 'def' that returns an async iterator."
            )
        parameters = len(inspect.signature(method).parameters)
        if parameters not in (2, 3):
            raise GraphError(
                f"{title}.{attribute} takes {parameters - 1} arguments; an endpoint takes a request and, "
                "if it wants it, a context."
            )
        if address in taken:
            raise GraphError(f"{title} has two endpoints named '{address}': {taken[address]} and {attribute}.")
        taken[address] = attribute
        found[attribute] = EndpointSpec(address, attribute, parameters == 3)
    return found


def _hooks(cls: type, title: str) -> dict[str, tuple[str, ...]]:
    hooks: dict[str, tuple[str, ...]] = {}
    for attribute, method in _members(cls).items():
        kind = getattr(method, _HOOK, None)
        if kind is None:
            continue
        if not inspect.iscoroutinefunction(method):
            raise GraphError(f"{title}.{attribute} is a life-cycle hook and must be an 'async def' without 'yield'.")
        hooks[kind] = (*hooks.get(kind, ()), attribute)
    return hooks
