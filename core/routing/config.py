"""Settings of routing, under the names that a configuration uses."""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from core.messages import ConfigError, Medium


class QueueOrder(StrEnum):
    """Who leaves the router's queue first."""

    FCFS = "fcfs"
    """First come, first served."""
    PRIORITY = "priority"
    """Larger `RequestContext.priority` first; among equals the one that came first."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How requests are routed. In a configuration every name is written with dashes: `kv-hit-weight`."""

    router: str = "kv"
    """Name of the policy."""
    kv_hit_weight: float = 1.0
    """What a prompt that is cached whole is worth."""
    load_weight: float = 0.5
    """What it costs when as much work as the request itself is ahead of it. 0 routes by hits alone."""
    host_hit_weight: float = 0.75
    """A block in host memory, in blocks on the device."""
    disk_hit_weight: float = 0.25
    """A block on a local disk, in blocks on the device."""
    external_hit_weight: float = 0.25
    """A block in a store that workers share, in blocks on the device."""
    router_events: bool = True
    """False: `kv` remembers what it routed instead of listening to KV events."""
    router_ttl: float = 600.0
    """Seconds for which a prefix that was routed counts as cached, without events."""
    session_affinity: bool = False
    """Send a session to the worker it was on, while that is there and not saturated."""
    session_ttl: float = 600.0
    """Seconds without a request after which a session may go anywhere."""
    router_queue_threshold: float | None = None
    """Hold requests while every worker is used to this multiple of its capacity; None never holds any."""
    router_queue_limit: int = 1024
    """Requests held at most; more are refused with 429."""
    router_queue_order: QueueOrder = QueueOrder.FCFS
    """Who leaves the queue first: fcfs, or priority and among equals first come first served."""
    router_max_blocks: int = 8_000_000
    """Blocks in the prefix index at most, about 100 bytes each."""
    router_seed: int | None = None
    """Seeds whatever is random, so that a run can be repeated."""

    def tier_weights(self) -> dict[Medium, float]:
        """What a cached block counts by its medium, in blocks on the device."""
        return {
            Medium.DEVICE: 1.0,
            Medium.HOST: self.host_hit_weight,
            Medium.DISK: self.disk_hit_weight,
            Medium.EXTERNAL: self.external_hit_weight,
        }

    def check(self) -> None:
        """Raises `ConfigError`, in a sentence, for a value that makes no sense. The policy's name is checked later."""
        for name in ("kv_hit_weight", "load_weight", "router_ttl", "session_ttl"):
            _number(name, getattr(self, name), math.inf)
        for name in ("host_hit_weight", "disk_hit_weight", "external_hit_weight"):
            _number(name, getattr(self, name), 1.0)
        if self.router_queue_threshold is not None:
            _number("router_queue_threshold", self.router_queue_threshold, math.inf)
            if not self.router_queue_threshold:
                raise ConfigError(
                    "router-queue-threshold is 0, which holds every request for ever; "
                    "expected a multiple of a worker's capacity such as 1.0, or leave it out to hold none."
                )
        for name in ("router_queue_limit", "router_max_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_dashed(name)} is {getattr(self, name)}; expected 1 or more.")
        if not self.kv_hit_weight and not self.load_weight and self.router == "kv":
            raise ConfigError(
                "kv-hit-weight and load-weight are both 0, so every worker scores the same; "
                "set one of them, or choose the policy 'random'."
            )


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _number(name: str, value: object, most: float) -> None:
    fits = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= most
    )
    if not fits:
        wanted = "a number of 0 or more" if most == math.inf else f"a number from 0 to {most:g}"
        raise ConfigError(f"{_dashed(name)} is {value!r}; expected {wanted}.")
