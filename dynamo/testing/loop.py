"""The event loop that engines under test live on: a thread of its own, so that a stuck engine cannot hang pytest."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 10.0
"""Seconds that the loop has to wind up."""
BREATH = 1.0
"""Seconds within which a loop that is not blocked answers."""


class LoopThread:
    """Owns one event loop and the thread that runs it, from construction until `close`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="dynamo-testing", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """The result of `work`, run on the loop. Raises `AssertionError` when it takes longer than `timeout` seconds.

        The error tells an engine that blocks the event loop, with the place, from one that never answers.
        """
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                raise
        raise AssertionError(self._give_up(future, timeout))

    def close(self) -> None:
        """Cancels what still runs, then ends loop and thread. A blocked loop is left to its daemon thread."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop)
        self.loop.call_soon_threadsafe(lambda: self.loop.call_later(0, self.loop.stop))
        self._thread.join(GRACE)

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def _give_up(self, future: Future[Any], timeout: float) -> str:
        breath = threading.Event()
        self.loop.call_soon_threadsafe(breath.set)
        if breath.wait(BREATH):
            future.cancel()
            return f"not finished after {timeout:g} s: something waits for ever (the limit is test_timeout)"
        frame = sys._current_frames().get(self._thread.ident or 0)
        place = "".join(traceback.format_stack(frame)[-4:]) if frame else "(the thread has ended)"
        return (
            f"the engine blocks the event loop; work that computes belongs in a thread or process. It is at:\n{place}"
        )


async def _cancel_all() -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
