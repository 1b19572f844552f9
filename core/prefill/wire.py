"""How a decode and a prefill worker reach each other: one question, one answer, or the knowledge that nobody is there.

Nothing here is reliable, and nothing needs to be: what is lost is made good by deadlines and leases. The in-process
wire is here; `core/prefill/runtime_wire.py` has the one over the runtime, which may be many processes, and both pass
the same tests.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from core.messages.errors import EngineError
from core.prefill.messages import Answer, Question

logger = logging.getLogger("dynamo.prefill")

Handler = Callable[[Question], Awaitable[Answer]]


class WireError(EngineError):
    """The question was not answered. Whether it arrived is not known."""

    retryable = True


class Unreachable(WireError):
    """Nobody serves the address: its owner has left or died. Addresses are never used again by another life."""


class Wire(ABC):
    """Carries questions to addresses."""

    @abstractmethod
    async def serve(self, address: str, handler: Handler) -> None:
        """Answer what is sent to `address` until `withdraw`. Raises `ValueError` when it is served already."""

    @abstractmethod
    async def withdraw(self, address: str) -> None:
        """Stop answering. Idempotent."""

    @abstractmethod
    async def ask(self, address: str, question: Question, timeout: float) -> Answer:  # noqa: ASYNC109
        """Send a question and give the answer. `timeout` in seconds.

        Raises `Unreachable` when nobody serves the address, `WireError` when no answer came in time or the handler
        failed.
        """


class LocalWire(Wire):
    """All workers are in this process."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    async def serve(self, address: str, handler: Handler) -> None:
        if address in self._handlers:
            raise ValueError(f"'{address}' is served already")
        self._handlers[address] = handler

    async def withdraw(self, address: str) -> None:
        self._handlers.pop(address, None)

    async def ask(self, address: str, question: Question, timeout: float) -> Answer:  # noqa: ASYNC109
        handler = self._handlers.get(address)
        if handler is None:
            raise Unreachable(f"no worker answers at '{address}': it has left, or died")
        try:
            async with asyncio.timeout(timeout):
                return await handler(question)
        except TimeoutError as error:
            raise WireError(f"'{address}' did not answer {type(question).__name__} within {timeout:g} s") from error
        except Exception as error:
            logger.exception("'%s' failed to answer %s.", address, type(question).__name__)
            raise WireError(f"'{address}' failed to answer {type(question).__name__}: {error}") from error
