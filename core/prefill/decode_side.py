"""The decode worker's side of disaggregated prefill: one stream for the client, wherever the prompt was computed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec

from core.engine.host import EngineHost
from core.kv.session import KvSessions, SessionCounts
from core.kv.ticket import Holder, TicketGate, TicketKey
from core.messages.engine import Rendezvous
from core.messages.output import Delta, FinishReason
from core.messages.request import EngineRequest
from core.observe.histogram import LoopHistogram
from core.prefill.decision import DisaggPolicy, PrefillDecision
from core.prefill.decode_plan import PrefillStory, Way
from core.prefill.decode_run import DecodeRun
from core.prefill.messages import Answer, AttemptFailed, Gone, KvReady, Noted, PrefillTask, Question, TaskTaken
from core.prefill.queue import PrefillQueue
from core.prefill.settings import DisaggSettings
from core.prefill.wire import Wire

logger = logging.getLogger("dynamo.prefill")

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class DecodeTimes:
    """Histograms of the decode side, in seconds."""

    def __init__(self) -> None:
        self.queue = LoopHistogram(
            "dynamo_prefill_queue_seconds", "From submitting a prefill task to its being taken.", SECONDS
        )
        self.prefill = LoopHistogram(
            "dynamo_prefill_remote_seconds", "From a prefill task's being taken to its KV's being ready.", SECONDS
        )
        self.transfer = LoopHistogram("dynamo_kv_import_seconds", "From a KV ticket's arrival to the KV's.", SECONDS)


class DecodeSide:
    """Owned by a Worker. `start` before the first request, `close` after the last; both idempotent."""

    def __init__(
        self,
        host: EngineHost,
        queue: PrefillQueue,
        wire: Wire,
        settings: DisaggSettings,
        *,
        worker_id: str,
        key: TicketKey,
        policy: DisaggPolicy | None = None,
        times: DecodeTimes | None = None,
    ) -> None:
        """`host`: a started decode engine. `key`: the deployment's, as on every PrefillWorker. `queue` and `wire` stay
        the caller's to close. `times`: what to observe in, where several Workers share it.
        """
        self.host = host
        self.queue = queue
        self.wire = wire
        self.settings = settings
        self.policy = policy or DisaggPolicy(settings)
        self.holder = Holder.new(worker_id)
        self.address = f"prefill.{worker_id}.{self.holder.incarnation}"
        self.gate = TicketGate(key, worker_id)
        self.rooms = KvSessions(host.release_kv)
        self.times = times or DecodeTimes()
        self.ends: Counter[str] = Counter()
        """By `Way`."""
        self.give_ups: Counter[str] = Counter()
        """Prefills that could not be had elsewhere, by where it ended and what happened there."""
        self.imported_tokens = 0
        """Whose KV came from elsewhere."""
        self._runs: dict[str, DecodeRun] = {}
        self._requests: dict[str, DecodeRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to answer PrefillWorkers."""
        await self.wire.serve(self.address, self._answer)

    async def close(self) -> None:
        """End what is under way, release every room, stop answering."""
        for run in list(self._runs.values()):
            run.abort()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.settings.stop_timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.wire.withdraw(self.address)
        await self.rooms.close()

    async def decide(
        self, request: EngineRequest, cached_tokens: int = 0, *, workers: int | None = None
    ) -> PrefillDecision:
        """Where the prompt is best prefilled. `cached_tokens`: leading ones that this engine is known to have;
        `workers`: PrefillWorkers that are live, where that is known.
        """
        return await self.policy.decide(len(request.token_ids), cached_tokens, self.queue.depth, workers=workers)

    async def decode(
        self,
        request: EngineRequest,
        decision: PrefillDecision,
        *,
        block_hashes: tuple[int, ...] = (),
        told: Callable[[PrefillStory], None] | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The whole stream, as `EngineHost.decode` gives it; closing it early lets everybody go. `told` hears, before
        the first delta, how a remote prefill went.

        Raises what `EngineHost.decode` raises, and `EngineError` when the prefill failed and may not be done here.
        """
        if not decision.remote:
            self.ends["local by decision"] += 1
            async with contextlib.aclosing(_closable(self.host.decode(request))) as stream:
                async for delta in stream:
                    yield delta
            return
        task = PrefillTask(
            task_id=f"{request.request_id}#{secrets.token_hex(4)}",
            request=request,
            decode_worker=self.holder.worker_id,
            reply_to=self.address,
            rendezvous=self._rendezvous(),
            fingerprint=self.host.info.kv_fingerprint,
            block_hashes=block_hashes,
        )
        run, plan = DecodeRun(self, task), None
        self._runs[task.task_id] = self._requests[request.request_id] = run
        try:
            run.start()
            plan = await run.plan()
            self.ends[plan.way] += 1
            if told is not None:
                told(run.story())
            if plan.error is not None:
                raise plan.error
            if plan.way is Way.ABORTED:
                yield Delta([], finish=FinishReason.ABORT)
            elif plan.way is Way.FIRST:
                assert plan.first is not None
                yield plan.first
            else:
                first = plan.first
                async with contextlib.aclosing(_closable(self.host.decode(request, plan.room))) as stream:
                    async for delta in stream:
                        yield delta if first is None else _completed(delta, first)
                        first = None
        finally:
            if plan is None:  # nobody waited for it
                self.ends[Way.ABORTED] += 1
            run.end()
            del self._runs[task.task_id]
            if self._requests.get(request.request_id) is run:
                del self._requests[request.request_id]

    async def abort(self, request_id: str) -> None:
        """Stop a request wherever it is; its stream ends with `FinishReason.ABORT`. Idempotent, any id."""
        run = self._requests.get(request_id)
        if run is not None:
            run.abort()
        else:
            await self.host.abort(request_id)

    def spawn(self, call: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something that outlives the stream it was begun for; `close` waits for it."""
        task = asyncio.create_task(call, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settled(self) -> None:
        """Return when nothing is under way any more: no stream, no message, no room being freed."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self.rooms.freed()

    @property
    def under_way(self) -> int:
        """Remote prefills whose stream has not ended."""
        return len(self._runs)

    def counts(self) -> SessionCounts:
        """Of the rooms that were reserved."""
        return self.rooms.counts()

    def give_up_waiting(self, why: str) -> None:
        """No PrefillWorker is left: whatever still waits in the queue is served otherwise, at once."""
        for run in list(self._runs.values()):
            run.give_up_waiting(why)

    def check_integrity(self) -> None:
        """Raises `AssertionError` if a room is lost, or held for nobody."""
        self.rooms.check_integrity()
        assert set(self._requests.values()) <= set(self._runs.values()), "a request's run is not answered for"
        if not self._runs and not self._tasks:
            live = self.rooms.counts()
            assert live.live == live.retired, f"rooms {sorted(self.rooms.live)} are held for nobody"

    async def _answer(self, question: Question) -> Answer:
        run = self._runs.get(question.task_id)
        if isinstance(question, TaskTaken):
            return Gone("the request has ended") if run is None else await run.taken(question)
        if isinstance(question, KvReady):
            return Gone("the request has ended") if run is None else await run.ready(question)
        if isinstance(question, AttemptFailed) and run is not None:
            run.failed(question)
        return Noted()

    def _rendezvous(self) -> tuple[Rendezvous, ...]:
        """Best first: pull holds no room under a writer, so it comes first where the engine has a choice."""
        mine = self.host.description.capabilities.rendezvous
        return tuple(kind for kind in (Rendezvous.PULL, Rendezvous.PUSH, Rendezvous.HANDSHAKE) if kind in mine)


def _completed(delta: Delta, first: Delta) -> Delta:
    """The decode side's first delta, with what only the prefill side knows."""
    return msgspec.structs.replace(
        delta,
        cached_tokens=first.cached_tokens if first.cached_tokens is not None else delta.cached_tokens,
        prompt_logprobs=delta.prompt_logprobs or first.prompt_logprobs,
    )


class _closable:  # noqa: N801
    """An async iterator that may have no `aclose`, as one that has."""

    def __init__(self, stream: AsyncIterator[Delta]) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._stream

    async def aclose(self) -> None:
        close = getattr(self._stream, "aclose", None)
        if close is not None:
            await close()
