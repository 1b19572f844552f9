"""The event loop's side of running requests: where deltas wait for whoever reads them."""

from __future__ import annotations

import asyncio

from core.messages import Delta, EngineDead, FinishReason

Outcome = Delta | BaseException


class Stream:
    """One request's deltas, from the engine thread to one reader. Deltas that wait together are handed over as one."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.submitted = False
        """Whether the engine thread was told of the request."""
        self.aborted = False
        """Whether an abort was asked for."""
        self._delta: Delta | None = None
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def put(self, outcome: Outcome) -> None:
        """Adds a delta, or the error that ends the stream after the deltas before it."""
        if isinstance(outcome, BaseException):
            self._error = outcome
        else:
            self._delta = outcome if self._delta is None else merge(self._delta, outcome)
        self._ready.set()

    async def get(self) -> Delta:
        """What came since the last call, waiting for it if need be. Raises the error that ended the stream."""
        await self._ready.wait()
        delta, self._delta = self._delta, None
        if delta is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._ready.clear()
        return delta


class Streams:
    """Every request between its first step and its terminal delta, by id. Lives on the event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Stream] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def get(self, request_id: str) -> Stream | None:
        """The stream of an unfinished request."""
        return self._open.get(request_id)

    def open(self, request_id: str) -> Stream:
        """A stream for a new request. Pre: no unfinished request has the id."""
        assert request_id not in self._open
        stream = self._open[request_id] = Stream(request_id)
        self._empty.clear()
        return stream

    def close(self, stream: Stream) -> None:
        """Forgets a request. Idempotent."""
        if self._open.get(stream.request_id) is stream:
            del self._open[stream.request_id]
        if not self._open:
            self._empty.set()

    def deliver(self, request_id: str, outcome: Outcome) -> None:
        """Hands an outcome to its reader; a terminal one closes the stream."""
        stream = self._open.get(request_id)
        if stream is None:
            return
        stream.put(outcome)
        if isinstance(outcome, BaseException) or outcome.finish is not None:
            self.close(stream)

    def fail_all(self, message: str) -> None:
        """Ends every stream with `EngineDead`."""
        for stream in list(self._open.values()):
            stream.put(EngineDead(message))
            self.close(stream)

    async def wait_empty(self) -> None:
        """Returns when no request is left."""
        await self._empty.wait()


def aborted() -> Delta:
    """The terminal delta of a request that was aborted."""
    return Delta([], finish=FinishReason.ABORT)


def merge(first: Delta, second: Delta) -> Delta:
    """One delta of two that follow each other; the first is changed."""
    first.token_ids.extend(second.token_ids)
    if first.logprobs is not None and second.logprobs is not None:
        first.logprobs.extend(second.logprobs)
    first.finish, first.stop_token = second.finish, second.stop_token
    return first
