"""Clients of services: `self.worker.generate(request, context)` and what lies behind it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from core.graph.service import ServiceSpec
from core.messages import RequestContext
from core.runtime import Address, Client, Runtime


class EndpointClient:
    """One endpoint of a service. Calling it streams from an instance that the runtime picks."""

    __slots__ = ("client", "stream")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stream = client.stream

    def __call__(self, request: Any, context: RequestContext | None = None) -> AsyncGenerator[Any, None]:
        return self.stream(request, context or RequestContext(request_id=uuid.uuid4().hex))


class ServiceClient:
    """All endpoints of a service, by the names of its methods."""

    def __init__(self, runtime: Runtime, namespace: str, spec: ServiceSpec) -> None:
        self._service = spec.name
        self._endpoints = {
            method: EndpointClient(runtime.client(Address(namespace, spec.name, endpoint.name)))
            for method, endpoint in spec.endpoints.items()
        }
        self.__dict__.update(self._endpoints)

    def __getattr__(self, name: str) -> Any:
        known = ", ".join(self._endpoints) or "none"
        raise AttributeError(f"{self._service} has no endpoint '{name}'; its endpoints are {known}")


def client_of(method: Any) -> Client:
    """The runtime client behind an endpoint of a dependency: `client_of(self.worker.generate).instances()`."""
    if not isinstance(method, EndpointClient):
        raise TypeError(f"{method!r} is not an endpoint of a dependency")
    return method.client
