"""What Workers, Routers and Processors tell each other about routing."""

from __future__ import annotations

import msgspec

from core.components.prefill_messages import PrefillExplanation
from core.kv import KvReplayRequest
from core.kv.follower import FollowerCounters
from core.messages import Load
from core.openai.protocol import TokenizeRequest
from core.routing import Explanation, RoutingState
from core.routing.index import IndexCounters

RENEWAL_SECONDS = 20.0
"""How often a Router says to each worker that it still listens."""
INTEREST_SECONDS = 65.0
"""A worker that has not heard of a Router for this long stops publishing: three renewals and some patience."""

EVENTS = "kv_events"
LOADS = "kv_load"
INFLIGHT = "router_inflight"


def subject(namespace: str, kind: str, source: str = ">") -> str:
    """Where `source` (a worker or a Router) publishes messages of a kind; by default, where all of them do."""
    return f"{namespace}.{kind}.{source}"


class FeedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A Router listens to a worker, from now on for `INTEREST_SECONDS`."""

    events: bool
    """KV events are wanted too, not the load alone."""
    replay: KvReplayRequest | None = None
    """What the Router misses of the events; the answer has it."""


class LoadReport(msgspec.Struct, frozen=True):
    """What is on a worker's engine."""

    worker: str
    ranks: list[Load]


class RouteQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Asks a Router where a prompt would go. Nothing is generated, and nothing is remembered."""

    token_ids: list[int]
    lora: str | None = None
    cache_salt: str | None = None
    session: str | None = None


class RouteRequest(TokenizeRequest, kw_only=True):
    """Body of `POST /routing/explain`: a prompt as for `/v1/tokenize`, and whose it is."""

    session: str | None = None
    """As X-Session-Id, `prompt_cache_key` or `user` of a request."""
    cache_salt: str | None = None


class Routed(Explanation, frozen=True, kw_only=True):
    """A decision as clients see it."""

    router: str
    """The Router that decided."""
    candidates_omitted: int = 0
    """Candidates that are left out of the list, those with the lowest scores."""
    prefill: PrefillExplanation | None = None
    """Where that worker had the prompt prefilled; None in a graph without a PrefillWorker."""


class RouterCounters(msgspec.Struct):
    """What happened at a Router beside decisions, since its start."""

    rerouted: int = 0
    """Requests that went to the next best worker because the first could not take them."""
    lost: int = 0
    """Workers found gone by a request before anybody said so."""
    unreadable: int = 0
    """Load reports and reports of other Routers that could not be decoded."""


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    """One Router in the answer to `GET /routing/state`."""

    router: str
    block_size: int
    """Tokens in a KV block, on every worker."""
    peers: int
    """Other Routers of the deployment that are live."""
    routing: RoutingState
    refused: dict[str, str]
    """Workers that nothing is sent to, and why."""
    counters: RouterCounters
    events: FollowerCounters
    index: IndexCounters


class RoutersState(msgspec.Struct, frozen=True):
    """Answer to `GET /routing/state`."""

    routers: list[RouterState]
