"""The built-in engine: any Hugging Face decoder-only model on a paged KV cache, on a CPU or one GPU.

Importing this module imports neither torch nor transformers; starting the engine does. The parts, in the order in
which a request meets them: `accept` checks it, `thread` runs the steps, `scheduler` and `block_pool` decide what a step
computes and where its KV lies, `batch`, `model` and `attention` compute it, `sampler` and `constraint` choose the
tokens, `streams` hands them back. `kv_desk` is for workers that prefill or decode for each other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from core.engine import hookimpl
from core.messages import (
    Capabilities,
    ConfigError,
    ConstraintKind,
    Delta,
    EngineConfig,
    EngineDead,
    EngineDescription,
    EngineDraining,
    EngineError,
    EngineInfo,
    EngineRequest,
    FinishReason,
    KvEventBatch,
    KvReservation,
    KvTicket,
    Load,
    PrefillResult,
    Rendezvous,
    RequestRejected,
    Role,
)

if TYPE_CHECKING:
    from engines.torch.accept import Acceptor
    from engines.torch.events import EventFeed
    from engines.torch.kv_desk import KvDesk
    from engines.torch.kv_push import Push
    from engines.torch.sequence import Sequence
    from engines.torch.settings import Settings
    from engines.torch.streams import Stream, Streams
    from engines.torch.thread import EngineThread, Figures, Report

DESCRIPTION = EngineDescription(
    name="torch",
    summary="Hugging Face decoder-only models in plain PyTorch, on a CPU or one GPU",
    package="torch",
    tested=">=2.13,<2.15",
    install="pip install 'dynamo-serve[torch]'",
    capabilities=Capabilities(
        roles=frozenset(Role),
        rendezvous=frozenset({Rendezvous.PULL, Rendezvous.PUSH}),
        canonical_kv=True,
        kv_events=True,
        prefix_caching=True,
        constraints=frozenset(ConstraintKind),
        logprobs=True,
        prompt_logprobs=True,
        priority=True,
        devices=("cpu", "cuda"),
    ),
)


class TorchEngine:
    """The adapter. One instance is one worker; every method runs on the event loop and blocks it for microseconds."""

    def __init__(self) -> None:
        self._thread: EngineThread | None = None
        self._acceptor: Acceptor | None = None
        self._streams: Streams | None = None
        self._feed: EventFeed | None = None
        self._desk: KvDesk | None = None
        self._figures: Figures | None = None
        self._info: EngineInfo | None = None
        self._submitted = 0
        self._submitted_tokens = 0
        self._draining = False
        self._dead: str | None = None

    @hookimpl
    def describe_engine(self) -> EngineDescription:
        """See `EngineSpec.describe_engine`."""
        return DESCRIPTION

    @hookimpl
    async def start_engine(self, config: EngineConfig, role: Role) -> EngineInfo:
        """See `EngineSpec.start_engine`. The model is loaded on the engine thread."""
        # Imports and the look for devices take seconds: not on the event loop.
        settings = await asyncio.to_thread(_prepare, config)
        from engines.torch.accept import Acceptor
        from engines.torch.events import EventFeed
        from engines.torch.start import start
        from engines.torch.streams import Streams
        from engines.torch.thread import EngineThread, Figures

        self._streams = Streams()
        self._figures = Figures()
        self._thread = EngineThread(settings, start, self._on_report, self._on_failure)
        self._feed = EventFeed(self._thread)
        self._info = info = await self._thread.start()
        self._acceptor = Acceptor(settings, info)
        if role is not Role.AGGREGATED:
            self._desk = await _open_desk(self._thread, config, info)
        return info

    @hookimpl
    async def decode(self, request: EngineRequest, kv: str | None) -> AsyncIterator[Delta]:
        """See `EngineSpec.decode`."""
        thread, acceptor, streams = self._serving(draining=kv is not None)
        stream = self._open_stream(streams, request)
        finished = False
        try:
            if kv is None:
                sequence = await acceptor.sequence(request)
                if stream.aborted:
                    finished = True
                    yield Delta([], finish=FinishReason.ABORT)
                    return
                self._serving()
                self._submit(stream, sequence)
            else:
                room = self._require_desk().take(kv, request)
                self._submitted += 1
                stream.submitted = True
                thread.resume(room.sequence, kv, room.first)
            while not finished:
                delta = await stream.get()
                finished = delta.finish is not None
                yield delta
        finally:
            if not stream.submitted:
                streams.close(stream)
            elif not finished:
                thread.abort(request.request_id)

    @hookimpl
    async def prefill(self, request: EngineRequest, reservation: KvReservation | None) -> PrefillResult:
        """See `EngineSpec.prefill`."""
        thread, acceptor, streams = self._serving()
        desk = self._require_desk()
        stream = self._open_stream(streams, request)
        session = desk.new_session(request)
        push: Push | None = None
        first: Delta | None = None
        try:
            sequence = await acceptor.sequence(request)
            if stream.aborted:
                return PrefillResult(session, Delta([], finish=FinishReason.ABORT))
            self._serving()
            sequence.session = session
            if reservation is not None:
                push = desk.begin_push(session, reservation)
                sequence.push = True
            self._submit(stream, sequence)
            first = await stream.get()
            aborted = first.finish is FinishReason.ABORT
            await desk.end_push(session, now=aborted)
            if not aborted:
                desk.hold(session, sequence, push)
            return PrefillResult(session, first)
        except BaseException:
            if stream.submitted and first is None:
                thread.abort(request.request_id)
            desk.drop(session)
            await desk.end_push(session, now=True)
            raise
        finally:
            if first is not None or not stream.submitted:
                streams.close(stream)

    @hookimpl
    async def export_kv(self, session: str, reservation: KvReservation | None) -> KvTicket:
        """See `EngineSpec.export_kv`."""
        return await self._require_desk().export(session, reservation)

    @hookimpl
    async def reserve_kv(self, request: EngineRequest) -> KvReservation:
        """See `EngineSpec.reserve_kv`."""
        _, acceptor, _ = self._serving()
        desk = self._require_desk()
        return await desk.reserve(await acceptor.sequence(request))

    @hookimpl
    async def import_kv(self, ticket: KvTicket, session: str) -> None:
        """See `EngineSpec.import_kv`."""
        await self._require_desk().import_(ticket, session)

    @hookimpl
    async def release_kv(self, session: str) -> None:
        """See `EngineSpec.release_kv`."""
        if self._desk is not None:
            self._desk.release(session)

    @hookimpl
    async def abort(self, request_id: str) -> None:
        """See `EngineSpec.abort`."""
        stream = self._streams.get(request_id) if self._streams is not None else None
        if stream is not None:
            stream.aborted = True
            if stream.submitted and self._thread is not None:
                self._thread.abort(request_id)

    @hookimpl
    def kv_events(self) -> AsyncIterator[KvEventBatch]:
        """See `EngineSpec.kv_events`."""
        if self._feed is None:
            raise EngineDead("The torch engine is not running.")
        return self._feed.follow()

    @hookimpl
    def load(self) -> list[Load]:
        """See `EngineSpec.load`: the figures after the last step, and what was submitted since."""
        figures, info = self._figures, self._info
        if figures is None or info is None:
            return [Load(running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0)]
        return [
            Load(
                running=figures.running,
                waiting=figures.waiting + self._submitted - figures.absorbed,
                kv_blocks_used=figures.blocks_used,
                kv_blocks_total=info.num_kv_blocks,
                tokens_in_flight=figures.prompt_tokens_left + self._submitted_tokens - figures.absorbed_tokens,
            )
        ]

    @hookimpl
    async def check_health(self) -> None:
        """See `EngineSpec.check_health`."""
        if self._info is None:
            raise EngineDead(self._dead or "The torch engine is not running.")

    @hookimpl
    async def drain(self) -> None:
        """See `EngineSpec.drain`."""
        self._draining = True
        if self._streams is not None:
            await self._streams.wait_empty()
        if self._desk is not None:
            await self._desk.wait_empty()

    @hookimpl
    async def stop_engine(self) -> None:
        """See `EngineSpec.stop_engine`. Waits for the step in progress, or for a model that is being loaded."""
        thread = self._thread
        desk = self._desk
        self._end("The torch engine was stopped.")
        if desk is not None:
            await desk.close()
        if thread is not None:
            await thread.stop()
        self._thread = self._desk = None

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave up their blocks to others since the start, and were computed again."""
        return self._figures.preemptions if self._figures is not None else 0

    async def check_integrity(self) -> None:
        """Asserts that blocks and sequences agree; for tests and for debugging a live engine."""
        thread, _, _ = self._serving(draining=True)
        await thread.check_integrity()
        if self._desk is not None:
            self._desk.check_integrity()

    def _open_stream(self, streams: Streams, request: EngineRequest) -> Stream:
        if request.request_id in streams:
            raise RequestRejected(f"A request with id '{request.request_id}' is running already: ids must be unique.")
        return streams.open(request.request_id)

    def _submit(self, stream: Stream, sequence: Sequence) -> None:
        assert self._thread is not None
        self._submitted += 1
        self._submitted_tokens += sequence.num_prompt
        stream.submitted = True
        self._thread.add(sequence)

    def _require_desk(self) -> KvDesk:
        if self._thread is None:
            raise EngineDead(self._dead or "The torch engine is not running.")
        if self._desk is None:
            raise EngineError(
                "This worker prefills and decodes by itself: it holds no KV for others, nor takes any in."
            )
        return self._desk

    def _serving(self, *, draining: bool = False) -> tuple[EngineThread, Acceptor, Streams]:
        if self._thread is None or self._acceptor is None or self._streams is None:
            raise EngineDead(self._dead or "The torch engine is not running.")
        if self._draining and not draining:
            raise EngineDraining("The torch engine is draining and takes no new requests.")
        return self._thread, self._acceptor, self._streams

    def _on_report(self, report: Report) -> None:
        if self._info is None or self._streams is None or self._feed is None:
            return
        self._figures = report.figures
        for request_id, outcome in report.outcomes:
            self._streams.deliver(request_id, outcome)
        if report.events:
            self._feed.push(report.events)
        if report.computed and self._desk is not None:
            self._desk.computed(report.computed)

    def _on_failure(self, message: str) -> None:
        self._end(message)

    def _end(self, message: str) -> None:
        """Stops serving: every stream ends with `EngineDead`. Idempotent; the first message stays."""
        self._dead = self._dead or message
        self._info = self._acceptor = self._figures = None
        if self._feed is not None:
            self._feed.end()
        if self._desk is not None:
            self._desk.refuse_all()
        if self._streams is not None:
            self._streams.fail_all(message)


def _prepare(config: EngineConfig) -> Settings:
    # Where processors are shared, a thread that spins in OpenMP's barrier keeps the one it waits for from running:
    # steps were measured to take 10 to 30 times as long. Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from engines.torch import start  # noqa: F401
    from engines.torch.settings import Settings

    return Settings.resolve(config)


async def _open_desk(thread: EngineThread, config: EngineConfig, info: EngineInfo) -> KvDesk:
    from engines.torch.kv_desk import KvDesk

    if not thread.kv_pools:
        raise ConfigError(
            f"KV of {config.model} cannot be moved between workers: its layers, or their keys and values, differ in "
            "shape. Serve it with graphs.agg, where no KV is moved."
        )
    return await KvDesk.open(thread, thread.kv_pools, config, info)
