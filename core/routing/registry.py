"""Finds policies by name: the built-in ones, and those of installed packages.

A package adds a policy through the entry-point group `dynamo.policies`, under the name that users write:

    [project.entry-points."dynamo.policies"]
    weekend = "my_package.weekend:WeekendPolicy"

The entry names a class (or function) that takes a `PolicyContext` and gives a `Policy`. Built-in names come first; a
package cannot replace them. Entries are loaded when they are asked for, so a broken one disturbs nobody else.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint

from core.messages import ConfigError
from core.routing.policies.affinity import SessionAffinity
from core.routing.policies.base import Policy, PolicyContext
from core.routing.policies.kv import KvPolicy
from core.routing.policies.kv_approximate import KvApproximatePolicy
from core.routing.policies.least_loaded import LeastLoaded
from core.routing.policies.power_of_two import PowerOfTwo
from core.routing.policies.random_choice import RandomChoice
from core.routing.policies.round_robin import RoundRobin

GROUP = "dynamo.policies"
METHODS = ("choose", "dispatched", "forget", "check_integrity")

PolicyFactory = Callable[[PolicyContext], Policy]


def _kv(context: PolicyContext) -> Policy:
    return KvPolicy(context) if context.config.router_events else KvApproximatePolicy(context)


BUILT_IN: dict[str, PolicyFactory] = {
    "round-robin": RoundRobin,
    "random": RandomChoice,
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "kv": _kv,
}


class PolicyRegistry:
    """The policies that there are."""

    def __init__(self, entry_points: Iterable[EntryPoint] | None = None) -> None:
        """`entry_points` defaults to everything installed in the group."""
        found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
        self._installed = {entry.name: entry for entry in found if entry.name not in BUILT_IN}

    @property
    def names(self) -> list[str]:
        """Every name that can be asked for."""
        return sorted({*BUILT_IN, *self._installed})

    def create(self, context: PolicyContext) -> Policy:
        """The policy that `context.config.router` names, with session affinity around it when that is on.

        Raises `ConfigError` for an unknown name, a setting that makes no sense, or a policy that does not load.
        """
        context.config.check()
        policy = self._factory(context.config.router)(context)
        missing = [method for method in METHODS if not callable(getattr(policy, method, None))]
        if missing:
            raise ConfigError(
                f"Policy '{context.config.router}' has no method {', '.join(missing)}; "
                "see Policy in core/routing/policies/base.py for what a policy needs."
            )
        return SessionAffinity(context, policy) if context.config.session_affinity else policy

    def _factory(self, name: str) -> PolicyFactory:
        if name in BUILT_IN:
            return BUILT_IN[name]
        entry = self._installed.get(name)
        if entry is None:
            near = difflib.get_close_matches(name.replace("_", "-"), self.names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(self.names)}."
            raise ConfigError(f"Unknown routing policy '{name}'; {hint}")
        try:
            factory: PolicyFactory = entry.load()
        except Exception as error:
            raise ConfigError(
                f"Policy '{name}' ({entry.value}) could not be loaded: {type(error).__name__}: {error}."
            ) from error
        return factory
