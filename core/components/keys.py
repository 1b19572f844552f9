"""Configuration keys that several services share."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from core.graph.config import Follows, Known, Needs
from core.routing.registry import PolicyRegistry

POLICY_ALIASES = {"kv-load": "least-loaded"}
"""Names of the reference for policies that are called otherwise here."""


def policy_names() -> list[str]:
    """Every name that chooses a routing policy."""
    return [*PolicyRegistry().names, *POLICY_ALIASES]


Policy = Known(policy_names, "routing policy")
RouterMode = Annotated[str, Policy, Needs("Router", unless=("round-robin", "random"))]
HitWeight = Annotated[float, Meta(ge=0), Needs("Router")]
LoadWeight = Annotated[float, Meta(ge=0), Needs("Router")]
RouterThreads = Annotated[int, Meta(ge=1), Needs("Router")]

RemotePrefill = Annotated[bool, Needs("PrefillWorker", unless=(False,))]
PrefillLimit = Annotated[int, Meta(ge=0), Needs("PrefillWorker")]
KvTransfer = Annotated[dict[str, Any] | None, Needs("PrefillWorker", unless=(None,))]

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(gt=0, le=1)]

ServedName = Annotated[str, Follows("Frontend")]
ModelName = Annotated[str, Follows("Processor")]
BlockSize = Annotated[Positive | None, Follows("Processor")]
ModelOfWorker = Annotated[str, Follows("Worker")]
BlockSizeOfWorker = Annotated[Positive | None, Follows("Worker")]
