"""The engine thread: owns the model and every sequence, takes commands between steps, and reports after each.

It talks to the event loop by one `call_soon_threadsafe` a step, whatever the number of sequences. Commands are
callables on a queue; they run between two steps, so that nothing of the engine is ever shared.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from core.kv.transfer import KvPool
from core.messages import Delta, EngineDead, EngineInfo, KvEvent
from engines.torch.kv_holds import Holds
from engines.torch.scheduler import Scheduler
from engines.torch.sequence import Sequence
from engines.torch.settings import Settings
from engines.torch.stepper import Computed, Outcomes, Stepper
from engines.torch.streams import aborted

logger = logging.getLogger("dynamo.engine.torch")

T = TypeVar("T")


class Figures(NamedTuple):
    """State of the engine after a step."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    prompt_tokens_left: int = 0
    absorbed: int = 0
    """Requests that the thread took since it started; those submitted since then are waiting too."""
    absorbed_tokens: int = 0
    preemptions: int = 0


class Report(NamedTuple):
    """What a step has to tell the event loop."""

    outcomes: Outcomes
    events: list[KvEvent]
    figures: Figures
    computed: list[Computed]
    """Blocks of prompts under way that can be pushed."""


class Started(NamedTuple):
    """What loading gives: the engine's facts, and what the thread and the loop need of it."""

    info: EngineInfo
    stepper: Stepper
    kv_pools: list[KvPool]
    """The KV cache's memory, for transfers, by rank; empty when it has a shape that cannot be moved."""


class EngineThread:
    """Runs `load` and then steps, until `stop`. All methods but the private ones are for the event loop."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[Settings], Started],
        on_report: Callable[[Report], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """The callbacks run on the event loop; `on_failure` at most once, when the thread ends by an error."""
        self._settings = settings
        self._load = load
        self._on_report = on_report
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._asked: set[asyncio.Future[Any]] = set()
        self.kv_pools: list[KvPool] = []
        """As `Started.kv_pools`, from the start on."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._stepper: Stepper | None = None
        self._sequences: dict[str, Sequence] = {}
        self._outcomes: Outcomes = []
        self._events: list[KvEvent] = []
        self._listening = False
        self._absorbed = 0
        self._absorbed_tokens = 0
        name = f"torch-engine-{settings.config.worker_id}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def start(self) -> EngineInfo:
        """Loads the model; raises what loading raises."""
        self._thread.start()
        return await self._ready

    def add(self, sequence: Sequence) -> None:
        """Takes a new request on. Its outcomes come with reports."""
        self._commands.put(lambda: self._add(sequence))

    def abort(self, request_id: str) -> None:
        """Ends a request with an aborted delta; nothing happens when it is unknown or finished."""
        self._commands.put(lambda: self._abort(request_id))

    def listen(self) -> None:
        """From now on reports carry KV events; the first ones describe the cache as it is."""
        self._commands.put(self._listen)

    def deafen(self) -> None:
        """No more KV events."""
        self._commands.put(self._deafen)

    def resume(self, sequence: Sequence, session: str, first: Delta | None) -> None:
        """Takes a request on whose prompt's KV lies in a filled hold; see `Stepper.resume`."""
        self._commands.put(lambda: self._resume(sequence, session, first))

    def free(self, session: str, blocks: list[int] | None = None) -> None:
        """See `Holds.free`."""
        self._commands.put(lambda: self._holds.free(session, blocks))

    async def between_steps(self, work: Callable[[Scheduler], T]) -> T:
        """What `work` gives, done between two steps. Cancelling it does not keep the work from being done.

        Raises: what `work` raises, and `EngineDead` when the thread ends first.
        """
        return await self._ask(lambda: work(self._scheduler))

    async def check_integrity(self) -> None:
        """Asserts the invariants of blocks and sequences, between two steps."""
        await self._ask(self._check_integrity)

    async def stop(self) -> None:
        """Ends the thread after the step it is in. Idempotent; also before `start`."""
        self._stopping = True
        self._commands.put(lambda: None)
        if self._thread.ident is not None:
            await self._ended.wait()
            self._thread.join()

    def _run(self) -> None:
        try:
            info, self._stepper, self.kv_pools = self._load(self._settings)
        except BaseException as error:  # noqa: BLE001 - it is raised again, by start()
            self._post(self._fail_start, error)
        else:
            self._post(self._succeed_start, info)
            try:
                self._serve(self._stepper)
            except Exception as error:
                logger.exception("The torch engine of %s failed", self._settings.config.worker_id)
                self._post(self._on_failure, f"The torch engine failed: {type(error).__name__}: {error}")
        self._stepper = None
        self._sequences.clear()
        self._post(self._end)

    def _serve(self, stepper: Stepper) -> None:
        scheduler = stepper.scheduler
        while not self._stopping:
            if scheduler.num_unfinished and not stepper.stalled:
                while not self._commands.empty():
                    self._commands.get()()
                if scheduler.num_unfinished:
                    self._step(stepper)
            else:
                if not scheduler.num_unfinished and not scheduler.holds:
                    assert scheduler.pool.num_held == 0, "KV blocks are held and no request is left"
                self._commands.get()()
                stepper.stalled = False
            self._report(stepper)

    def _step(self, stepper: Stepper) -> None:
        for request_id, outcome in stepper.step():
            ends = isinstance(outcome, BaseException) or outcome.finish is not None
            if ends or self._sequences[request_id].session is not None:
                del self._sequences[request_id]
            self._outcomes.append((request_id, outcome))

    def _report(self, stepper: Stepper) -> None:
        scheduler = stepper.scheduler
        events = scheduler.pool.take_events()
        if self._listening:
            self._events += events
        figures = Figures(
            len(scheduler.running) + len(scheduler.holds),
            len(scheduler.waiting) + len(scheduler.ready),
            scheduler.pool.num_held,
            sum(sequence.num_prompt_left for sequence in self._sequences.values()),
            self._absorbed,
            self._absorbed_tokens,
            scheduler.num_preemptions,
        )
        self._post(self._on_report, Report(self._outcomes, self._events, figures, stepper.computed))
        self._outcomes, self._events, stepper.computed = [], [], []

    def _add(self, sequence: Sequence) -> None:
        assert self._stepper is not None
        self._absorbed += 1
        self._absorbed_tokens += sequence.num_prompt
        self._sequences[sequence.request_id] = sequence
        self._stepper.scheduler.add(sequence)

    def _resume(self, sequence: Sequence, session: str, first: Delta | None) -> None:
        assert self._stepper is not None
        self._absorbed += 1
        outcome = self._stepper.resume(sequence, session, first)
        if outcome is None or (isinstance(outcome, Delta) and outcome.finish is None):
            self._sequences[sequence.request_id] = sequence
        if outcome is not None:
            self._outcomes.append((sequence.request_id, outcome))

    @property
    def _holds(self) -> Holds:
        return self._scheduler.holds

    @property
    def _scheduler(self) -> Scheduler:
        assert self._stepper is not None
        return self._stepper.scheduler

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            assert self._stepper is not None
            self._stepper.scheduler.finish(sequence)
            self._outcomes.append((request_id, sequence.first_delta(aborted())))

    def _listen(self) -> None:
        assert self._stepper is not None
        pool = self._stepper.scheduler.pool
        pool.take_events()  # the snapshot has them
        self._listening = True
        self._events = pool.snapshot()

    def _deafen(self) -> None:
        self._listening = False
        self._events = []

    def _check_integrity(self) -> None:
        self._scheduler.check_integrity()
        assert len(self._sequences) == self._scheduler.num_unfinished

    async def _ask(self, work: Callable[[], T]) -> T:
        if self._ended.is_set():
            raise EngineDead("The torch engine is not running.")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._asked.add(answer)
        answer.add_done_callback(self._asked.discard)
        self._commands.put(lambda: self._answer(answer, work))
        return await answer

    def _answer(self, answer: asyncio.Future[T], work: Callable[[], T]) -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is raised again, where the question was asked
            self._post(_settle, answer, None, error)
        else:
            self._post(_settle, answer, result, None)

    def _end(self) -> None:
        self._ended.set()
        for answer in list(self._asked):
            _settle(answer, None, EngineDead("The torch engine was stopped."))

    def _succeed_start(self, info: EngineInfo) -> None:
        if not self._ready.cancelled():
            self._ready.set_result(info)

    def _fail_start(self, error: BaseException) -> None:
        if not self._ready.cancelled():
            self._ready.set_exception(error)

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            # The loop was closed without stopping the engine: nobody is left to tell, and the thread must end.
            self._stopping = True


def _settle(answer: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
