"""Endpoints and their clients, discovery, events, key-value and queues: one interface, several implementations."""

from core.runtime.interface import (
    Address,
    Balance,
    Client,
    Handler,
    Instance,
    InstanceEvent,
    InstanceGone,
    KeyEvent,
    KeyValue,
    Lease,
    NoInstance,
    QueueTask,
    Runtime,
    Served,
    Subscription,
    WorkQueue,
)
from core.runtime.local import LocalRuntime

__all__ = [
    "Address",
    "Balance",
    "Client",
    "Handler",
    "Instance",
    "InstanceEvent",
    "InstanceGone",
    "KeyEvent",
    "KeyValue",
    "Lease",
    "LocalRuntime",
    "NoInstance",
    "QueueTask",
    "Runtime",
    "Served",
    "Subscription",
    "WorkQueue",
]
