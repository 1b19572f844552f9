"""Runs a deployment until it is told to stop, and says honestly how it ended.

Exit codes: 0 after a stop in which every running request finished; 1 when something failed or requests were cut off;
128 plus the signal's number when stopping was forced or came before everything was up. Mistakes in the configuration
are raised as `ConfigError`, for which the command line exits with 2.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import uvloop

from core.cli.display import Display
from core.engine import EngineRegistry
from core.graph import Deployment, DeploymentFailed, Plan, Settings
from core.messages import DynamoError
from core.runtime import LocalRuntime

logger = logging.getLogger("dynamo.serve")

FORCED_STOP = 3.0
"""Seconds that services have to free what they hold when stopping is forced."""


class _Signals:
    """Counts SIGINT and SIGTERM. `first` and `second` resolve with the signal's number."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.first: asyncio.Future[int] = self._loop.create_future()
        self.second: asyncio.Future[int] = self._loop.create_future()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        for future in (self.first, self.second):
            if not future.done():
                future.set_result(number)
                return


def serve(plan: Plan, settings: Settings, engines: EngineRegistry, *, drain_timeout: float) -> int:
    """Serve until a signal or a failure. Gives the exit code; raises `DynamoError` when the start fails."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code, forced = runner.run(_serve(plan, settings, engines, drain_timeout))
        if forced:
            # An engine's thread may still be loading or computing, and the interpreter would wait for it.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


async def _serve(plan: Plan, settings: Settings, engines: EngineRegistry, drain_timeout: float) -> tuple[int, bool]:
    """The exit code, and whether to leave without waiting for threads."""
    display = Display()
    async with LocalRuntime() as runtime:
        deployment = Deployment(plan, settings, runtime, engines=engines, observe=display.on_event)
        with _Signals() as signals:
            with display.starting():
                number = await _unless(signals.first, deployment.start())
            if number is not None:
                display.say("Interrupted before everything was up.")
                return 128 + number, True
            display.ready(plan.name, deployment.announcements)
            try:
                number = await _unless(signals.first, deployment.wait())
            except DeploymentFailed as error:
                display.say(f"Error: {error}")
                await _stop(deployment, signals)
                return 1, True
            assert number is not None, "wait() ends only by an error"
            return await _drain(deployment, signals, display, drain_timeout)


async def _drain(deployment: Deployment, signals: _Signals, display: Display, limit: float) -> tuple[int, bool]:
    count = deployment.in_flight
    if count:
        display.say(f"Finishing {_requests(count)}; press Ctrl-C again to stop at once.")
    finished = True

    async def drain() -> None:
        nonlocal finished
        try:
            async with asyncio.timeout(limit):
                await deployment.drain()
        except TimeoutError:
            finished = False
            display.say(f"Not finished within {limit:g} s and cut off: {_requests(deployment.in_flight)}.")

    number = await _unless(signals.second, drain())
    if number is None:
        number = await _stop(deployment, signals)
    else:
        with suppress(TimeoutError):
            await asyncio.wait_for(deployment.stop(), FORCED_STOP)
    if number is not None:
        display.say("Stopped at once.")
        return 128 + number, True
    display.say("Stopped." if finished else "Stopped with requests cut off.")
    return (0 if finished else 1), False


async def _stop(deployment: Deployment, signals: _Signals) -> int | None:
    """Stop, unless a second signal says to hurry; gives that signal's number."""
    number = await _unless(signals.second, deployment.stop())
    if number is not None:
        with suppress(TimeoutError):
            await asyncio.wait_for(deployment.stop(), FORCED_STOP)
    return number


def _requests(count: int) -> str:
    return "1 running request" if count == 1 else f"{count} running requests"


async def _unless(interrupt: asyncio.Future[int], work: Coroutine[Any, Any, None]) -> int | None:
    """Do the work; None when it is done, the signal's number when one came first and the work was cancelled."""
    task = asyncio.create_task(work)
    try:
        waited: set[asyncio.Future[Any]] = {task, interrupt}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return None
        task.cancel()
        try:
            await asyncio.wait_for(task, FORCED_STOP)
        except (asyncio.CancelledError, TimeoutError):
            pass
        except DynamoError as error:
            logger.debug("ended by %s after the signal", error)
        return interrupt.result()
    finally:
        task.cancel()
