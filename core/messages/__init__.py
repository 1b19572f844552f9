"""Typed messages that cross the house's doors. This package imports nothing of the house."""

from core.messages.context import RequestContext
from core.messages.engine import (
    Capabilities,
    Continuation,
    EngineConfig,
    EngineDescription,
    EngineInfo,
    Load,
    Rendezvous,
    Role,
)
from core.messages.errors import (
    ConfigError,
    DynamoError,
    EngineDead,
    EngineDraining,
    EngineError,
    Overloaded,
    RequestRejected,
)
from core.messages.kv import (
    KvCleared,
    KvEvent,
    KvEventBatch,
    KvRemoved,
    KvReservation,
    KvStored,
    KvTicket,
    Medium,
)
from core.messages.output import Delta, FinishReason, PrefillResult, TokenLogprob
from core.messages.request import (
    Constraint,
    ConstraintKind,
    EngineRequest,
    SamplingParams,
    StopConditions,
)

__all__ = [
    "Capabilities",
    "ConfigError",
    "Constraint",
    "ConstraintKind",
    "Continuation",
    "Delta",
    "DynamoError",
    "EngineConfig",
    "EngineDead",
    "EngineDescription",
    "EngineDraining",
    "EngineError",
    "EngineInfo",
    "EngineRequest",
    "FinishReason",
    "KvCleared",
    "KvEvent",
    "KvEventBatch",
    "KvRemoved",
    "KvReservation",
    "KvStored",
    "KvTicket",
    "Load",
    "Medium",
    "Overloaded",
    "PrefillResult",
    "Rendezvous",
    "RequestContext",
    "RequestRejected",
    "Role",
    "SamplingParams",
    "StopConditions",
    "TokenLogprob",
]
