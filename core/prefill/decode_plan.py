"""What becomes of one remote prefill, and how it went."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from core.messages.output import Delta


class Way(StrEnum):
    """How the client's stream comes about."""

    IMPORTED = "imported"
    LOCAL = "fallback to local"
    FIRST = "ended by its first token"
    ABORTED = "aborted"
    FAILED = "failed"


class Plan(msgspec.Struct, frozen=True):
    """What the stream is made of."""

    way: Way
    room: str | None = None
    first: Delta | None = None
    error: Exception | None = None


class PrefillStory(msgspec.Struct, frozen=True, kw_only=True):
    """How a remote prefill went, for whoever asks why. Times are seconds."""

    way: Way
    worker: str | None
    """The PrefillWorker that had the task last."""
    attempts: int
    """PrefillWorkers that had it."""
    queued: float | None
    """Until the first of them took it."""
    prefill: float | None
    """From then until the KV was ready."""
    transfer: float | None
    """From then until the KV was here."""
    why: str | None
    """Why it is not as it was meant to be."""
