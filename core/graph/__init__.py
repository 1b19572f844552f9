"""Graphs of services: declaring, linking, configuring and running them."""

from core.graph.client import client_of
from core.graph.config import ServiceArgs, ServiceSettings, Settings
from core.graph.config.load import load_settings
from core.graph.context import Preflight, ServiceContext
from core.graph.depends import depends
from core.graph.deployment import Deployment, DeploymentFailed, ReplicaEvent, RestartPolicy, State
from core.graph.errors import GraphError, SettingError
from core.graph.links import Graph
from core.graph.loader import known_graphs, load_plan
from core.graph.plan import Plan, plan
from core.graph.service import Service, ServiceConfig, endpoint, on_drain, on_start, on_stop, service

__all__ = [
    "Deployment",
    "DeploymentFailed",
    "Graph",
    "GraphError",
    "Plan",
    "Preflight",
    "ReplicaEvent",
    "RestartPolicy",
    "Service",
    "ServiceArgs",
    "ServiceConfig",
    "ServiceContext",
    "ServiceSettings",
    "SettingError",
    "Settings",
    "State",
    "client_of",
    "depends",
    "endpoint",
    "known_graphs",
    "load_plan",
    "load_settings",
    "on_drain",
    "on_start",
    "on_stop",
    "plan",
    "service",
]
