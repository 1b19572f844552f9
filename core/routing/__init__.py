"""Decides which worker gets a request, from what their caches hold and from how busy they are.

`Selector` is the whole; docs/route.md tells how it decides.
"""

from core.routing.config import QueueOrder, RouterConfig
from core.routing.decision import Candidate, Decision, Explanation, Reason
from core.routing.load import Capacity, InflightReport, LoadTracker, TargetLoad
from core.routing.policies.base import Policy, PolicyContext
from core.routing.query import Query
from core.routing.registry import PolicyRegistry
from core.routing.selector import RoutingState, Selector, WorkerState

__all__ = [
    "Candidate",
    "Capacity",
    "Decision",
    "Explanation",
    "InflightReport",
    "LoadTracker",
    "Policy",
    "PolicyContext",
    "PolicyRegistry",
    "Query",
    "QueueOrder",
    "Reason",
    "RouterConfig",
    "RoutingState",
    "Selector",
    "TargetLoad",
    "WorkerState",
]
