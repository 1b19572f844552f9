"""What Workers and PrefillWorkers tell an operator about disaggregated prefill."""

from __future__ import annotations

from typing import Any

import msgspec

from core.kv.session import SessionCounts
from core.messages import Load
from core.prefill.decision import PrefillDecision
from core.prefill.decode_plan import PrefillStory
from core.prefill.queue import QueueCounts


class PrefillExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """Where one prompt was prefilled and why, on responses to requests with X-Dynamo-Explain."""

    worker: str
    """The Worker that decided, and decodes."""
    decision: PrefillDecision
    story: PrefillStory | None
    """How the remote prefill went; None when none was tried."""


class WorkerExplanation(msgspec.Struct, frozen=True):
    """`Delta.decision` as a Worker sets it."""

    prefill: PrefillExplanation


class DecodeState(msgspec.Struct, frozen=True, kw_only=True):
    """One Worker in the answer to `GET /prefill/state`."""

    worker: str
    prefill_workers: int
    """Live ones, as this Worker knows."""
    settings: dict[str, Any]
    """Settings that can be changed now, as they are in force."""
    decisions: dict[str, int]
    """By reason."""
    ways: dict[str, int]
    """How remote prefills ended."""
    given_up: dict[str, int]
    """Of these, those that could not be had elsewhere: where it ended, and what happened there."""
    imported_tokens: int
    under_way: int
    """Requests whose KV is, or may still be, computed elsewhere."""
    rooms: SessionCounts
    """Room for KV that was reserved here."""
    engine: list[Load]
    queue: QueueCounts
    """What this process did at the queue."""
    queue_depth: int | None
    """Tasks that wait; None when the queue cannot be reached."""
    fault: str | None
    """What `check_integrity` found."""


class PrefillerState(msgspec.Struct, frozen=True, kw_only=True):
    """One PrefillWorker in the answer to `GET /prefill/state`."""

    worker: str
    computing: int
    """Tasks that keep its engine busy."""
    holding: int
    """Tasks whose KV waits to be fetched."""
    failures: dict[str, int]
    """Tasks that could not be served, by kind."""
    sessions: SessionCounts
    """KV that was held for Workers."""
    engine: list[Load]
    fault: str | None
    """What `check_integrity` found."""


class PrefillState(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `GET /prefill/state`."""

    workers: list[DecodeState]
    prefill_workers: list[PrefillerState]


class PrefillSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `GET` and `POST /prefill/settings`."""

    settings: dict[str, Any]
    """What can be changed while serving, as it is in force from the next request on."""
    configured: dict[str, Any]
    """The same as configured."""
