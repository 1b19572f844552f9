"""Prefill here or elsewhere: the decision, its reasons, and how it is changed while requests are served.

As in the original: elsewhere if the uncached part of the prompt is longer than `max-local-prefill-length` and the queue
is shorter than `max-prefill-queue-size`; without `conditional-disagg` always elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from core.messages.errors import ConfigError
from core.prefill.queue import QueueUnavailable
from core.prefill.settings import DisaggSettings

logger = logging.getLogger("dynamo.prefill")

LIVE = (
    "enable-disaggregated-prefill",
    "remote-prefill",
    "conditional-disagg",
    "max-local-prefill-length",
    "max-prefill-queue-size",
)
"""Settings that may change while requests are served."""


_SWITCHES = ("enable_disaggregated_prefill", "remote_prefill")
"""Two names of one setting: a live change of either is one of both."""


class Reason(StrEnum):
    """Why a prompt is prefilled where it is; few and stable, for metrics."""

    OFF = "off"
    CACHED = "cached"
    NO_WORKER = "no worker"
    ALWAYS = "always"
    SHORT = "short"
    LONG = "long"
    QUEUE_LONG = "queue long"
    QUEUE_UNAVAILABLE = "queue unavailable"


class PrefillDecision(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prompt is prefilled, and everything that it was decided from."""

    remote: bool
    code: Reason
    reason: str
    """The same as a sentence."""
    prompt_tokens: int
    cached_tokens: int
    """Of these, leading ones whose KV the Worker has already."""
    max_local_prefill_length: int
    max_prefill_queue_size: int
    conditional: bool
    queue_depth: int | None = None
    """None when it did not matter, or could not be had."""

    @property
    def uncached_tokens(self) -> int:
        """What there is to compute."""
        return self.prompt_tokens - self.cached_tokens


class DisaggPolicy:
    """The settings in force. A change applies to the next request."""

    def __init__(self, settings: DisaggSettings) -> None:
        self._configured = settings
        self.settings = settings

    def reconfigure(self, values: Mapping[str, Any]) -> None:
        """Change some of the `LIVE` settings; a value of None restores what was configured. All or nothing.

        Raises `ConfigError`, with everything as it was, for a key that cannot change now or a value that cannot be.
        """
        changes: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name.replace("_", "-") not in LIVE:
                raise ConfigError(f"'{key}' cannot be changed while serving; what can is {', '.join(LIVE)}.")
            for each in _SWITCHES if name in _SWITCHES else (name,):
                changes[each] = getattr(self._configured, each) if value is None else value
        self.settings = self.settings.changed(changes)

    def restore(self) -> None:
        """Everything as configured."""
        self.settings = self._configured

    async def follow(self, changes: AsyncIterator[bytes | None]) -> None:
        """Apply JSON objects as they come; None restores what was configured. What cannot be applied is logged, and the
        next change is awaited. Returns when there are no more.
        """
        async for change in changes:
            if change is None:
                self.restore()
                continue
            try:
                self.reconfigure(msgspec.json.decode(change, type=dict[str, Any]))
            except (ConfigError, msgspec.MsgspecError) as error:
                logger.error("A change of disaggregated prefill is not applied: %s", error)

    async def decide(
        self,
        prompt_tokens: int,
        cached_tokens: int,
        depth: Callable[[], Awaitable[int]],
        *,
        workers: int | None = None,
    ) -> PrefillDecision:
        """Where to prefill. `depth` gives the queue's length and is asked only when it matters; it may fail. `workers`:
        PrefillWorkers that are live, where that is known.
        """
        settings = self.settings
        uncached = prompt_tokens - cached_tokens
        waiting: int | None = None
        longest = settings.max_local_prefill_length
        if not settings.enabled:
            code, reason = Reason.OFF, "remote prefill is off."
        elif uncached <= 0:
            code, reason = Reason.CACHED, "nothing is left to compute."
        elif workers == 0:
            code, reason = Reason.NO_WORKER, "no prefill worker is live."
        elif not settings.conditional_disagg:
            code, reason = Reason.ALWAYS, "every prompt is prefilled remotely, as conditional-disagg is off."
        elif uncached <= longest:
            code = Reason.SHORT
            reason = f"{uncached} uncached tokens are not more than max-local-prefill-length, {longest}."
        else:
            try:
                waiting = await depth()
            except QueueUnavailable as error:
                code, reason = Reason.QUEUE_UNAVAILABLE, str(error)
            else:
                code = Reason.LONG if waiting < settings.max_prefill_queue_size else Reason.QUEUE_LONG
                reason = (
                    f"{uncached} uncached tokens are more than max-local-prefill-length, {longest}, and {waiting} "
                    f"waiting tasks are {'fewer' if code is Reason.LONG else 'not fewer'} than max-prefill-queue-size, "
                    f"{settings.max_prefill_queue_size}."
                )
        remote = code in (Reason.ALWAYS, Reason.LONG)
        return PrefillDecision(
            remote=remote,
            code=code,
            reason=("Remote: " if remote else "Local: ") + reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            max_local_prefill_length=settings.max_local_prefill_length,
            max_prefill_queue_size=settings.max_prefill_queue_size,
            conditional=settings.conditional_disagg,
            queue_depth=waiting,
        )
