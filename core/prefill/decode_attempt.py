"""What the decode side knows of one PrefillWorker's try at its task."""

from __future__ import annotations

import asyncio

from core.kv.lease import Deadline
from core.prefill.messages import Answer, KvReady, TaskTaken


class Attempt:
    """What is known of one worker's try."""

    __slots__ = ("asks", "ready", "room", "taken", "until")

    def __init__(self, taken: TaskTaken) -> None:
        self.taken = taken
        self.asks: list[asyncio.Future[Answer]] = []
        self.ready: KvReady | None = None
        self.room: str | None = None
        """The room that it may write to."""
        self.until: Deadline | None = None
        """When it has to be done, once it was told to proceed."""

    def reply(self, answer: Answer) -> None:
        """Answer every question of its that waits for one."""
        for ask in self.asks:
            if not ask.done():
                ask.set_result(answer)
        self.asks.clear()
