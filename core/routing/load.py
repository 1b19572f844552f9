"""How busy every target is: what this router sent, what other routers say they sent, and what workers report.

Work is counted in tokens, so that it can be compared with a prompt:

    work = prompt tokens sent and not yet prefilled + RESIDENT_WEIGHT * tokens of unfinished sequences

The first part is what a new request waits for. The second is what it shares the worker with afterwards: every resident
sequence slows each step and takes room in the cache.

Workers report late and routers know only what passed through them, so of the two the larger is believed, after bringing
the report up to date with what was sent and what ended since. A burst therefore counts at once, and traffic from
elsewhere counts too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from core.kv import Target
from core.messages import EngineInfo, Load

RESIDENT_WEIGHT = 0.05
"""Tokens of prefill that a resident token is worth. See docs/route.md for where it comes from."""
PEER_SECONDS = 10.0
"""A router that has said nothing for this long is gone, and its work with it."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """How much a target can have at once."""

    block_size: int
    num_kv_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int

    @classmethod
    def of(cls, info: EngineInfo) -> Capacity:
        """As a started engine states it. Ranks are alike, and each has all of this."""
        return cls(
            block_size=info.block_size,
            num_kv_blocks=info.num_kv_blocks,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_num_seqs=info.max_num_seqs,
        )


class TargetLoad(msgspec.Struct, kw_only=True):
    """Unfinished work on a target."""

    prefill_tokens: int = 0
    """Prompt tokens to compute: those of prompts not prefilled yet, without what the cache holds."""
    resident_tokens: int = 0
    """Tokens of unfinished sequences, prompt and output."""
    requests: int = 0

    def add(self, other: TargetLoad, sign: int = 1) -> None:
        """Adds (or, with `sign` -1, takes off) another load."""
        self.prefill_tokens += sign * other.prefill_tokens
        self.resident_tokens += sign * other.resident_tokens
        self.requests += sign * other.requests


class InflightReport(msgspec.Struct, frozen=True, kw_only=True):
    """One router's in-flight work, whole: the latest one says everything, so a lost one does no harm."""

    router: str
    sequence: int
    targets: list[tuple[Target, TargetLoad]]


class _State:
    """What is known of one target."""

    __slots__ = ("capacity", "peers", "reported", "sent", "since")

    def __init__(self, capacity: Capacity | None) -> None:
        self.capacity = capacity
        self.sent = TargetLoad()
        self.peers = TargetLoad()
        self.reported: TargetLoad | None = None
        self.since = TargetLoad()
        """How `sent` has changed since the last report: dispatched less ended."""

    def known(self) -> TargetLoad:
        sent, peers, reported = self.sent, self.peers, self.reported
        load = TargetLoad(
            prefill_tokens=sent.prefill_tokens + peers.prefill_tokens,
            resident_tokens=sent.resident_tokens + peers.resident_tokens,
            requests=sent.requests + peers.requests,
        )
        if reported is not None:
            since = self.since
            load.prefill_tokens = max(load.prefill_tokens, reported.prefill_tokens + since.prefill_tokens)
            load.resident_tokens = max(load.resident_tokens, reported.resident_tokens + since.resident_tokens)
            load.requests = max(load.requests, reported.requests + since.requests)
        return load


class _Flight:
    """One dispatched request. `state` is None when its target was not live."""

    __slots__ = ("load", "state", "target")

    def __init__(self, target: Target, state: _State | None, load: TargetLoad) -> None:
        self.target = target
        self.state = state
        self.load = load


class LoadTracker:
    """Work on every live target. Every request of every policy passes through it: `dispatch`, then `finish`."""

    def __init__(self, router: str = "router", *, clock: Callable[[], float] = time.monotonic) -> None:
        """`router`: names this router among those that share their in-flight work; another one after a restart."""
        self.router = router
        self._clock = clock
        self._states: dict[Target, _State] = {}
        self._flights: dict[str, _Flight] = {}
        self._reports: dict[str, tuple[float, InflightReport]] = {}
        self._sequence = 0
        self.work: dict[Target, float] = {}
        """Work of every live target, in tokens. Read it; the tracker alone writes it."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The live targets."""
        return tuple(self._states)

    @property
    def in_flight(self) -> int:
        """Requests that this router sent and that have not finished."""
        return len(self._flights)

    def add(self, target: Target, capacity: Capacity | None = None) -> None:
        """A target has come, or its capacity is known now. Idempotent."""
        state = self._states.get(target)
        if state is None:
            state = self._states[target] = _State(capacity)
            self._merge_peers()
        else:
            state.capacity = capacity or state.capacity
        self._update(target, state)

    def remove(self, target: Target) -> None:
        """A target is lost. Requests in flight there end through `finish` as ever. Idempotent."""
        if self._states.pop(target, None) is not None:
            del self.work[target]

    def dispatch(self, request_id: str, target: Target, *, prompt_tokens: int, hit_tokens: int = 0) -> None:
        """A request is about to be sent. One that is in flight already moves: a retry counts once."""
        self.finish(request_id)
        load = TargetLoad(prefill_tokens=max(prompt_tokens - hit_tokens, 0), resident_tokens=prompt_tokens, requests=1)
        state = self._states.get(target)
        self._flights[request_id] = _Flight(target, state, msgspec.structs.replace(load))
        if state is not None:
            state.sent.add(load)
            state.since.add(load)
            self._update(target, state)

    def prefilled(self, request_id: str) -> None:
        """The first token of a request has come. Idempotent; unknown ids are left alone."""
        flight = self._flights.get(request_id)
        if flight is not None and flight.load.prefill_tokens:
            self._take(flight, TargetLoad(prefill_tokens=flight.load.prefill_tokens))

    def finish(self, request_id: str) -> None:
        """A request has ended, however it did. Idempotent; unknown ids are left alone."""
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self._take(flight, flight.load)

    def report(self, target: Target, load: Load) -> None:
        """What a worker says of itself. Unknown targets are left alone."""
        state = self._states.get(target)
        if state is None:
            return
        block_size = state.capacity.block_size if state.capacity is not None else 0
        state.reported = TargetLoad(
            prefill_tokens=load.tokens_in_flight,
            resident_tokens=load.kv_blocks_used * block_size,
            requests=load.running + load.waiting,
        )
        state.since = TargetLoad()
        self._update(target, state)

    def share(self) -> InflightReport:
        """This router's in-flight work, for the others' `merge`."""
        self._sequence += 1
        targets = [
            (target, msgspec.structs.replace(state.sent))
            for target, state in self._states.items()
            if state.sent.requests
        ]
        return InflightReport(router=self.router, sequence=self._sequence, targets=targets)

    def merge(self, report: InflightReport) -> None:
        """Another router's in-flight work. One's own, and one that a later overtook, are left alone."""
        known = self._reports.get(report.router)
        now = self._clock()
        if report.router == self.router:
            return
        if known is not None and known[1].sequence >= report.sequence and now - known[0] < PEER_SECONDS:
            return
        self._reports[report.router] = (now, report)
        self._refresh_peers()

    def forget_router(self, router: str) -> None:
        """Another router is gone. Idempotent."""
        if self._reports.pop(router, None) is not None:
            self._refresh_peers()

    def tick(self) -> None:
        """Forgets routers that have gone silent. Call it about once a second."""
        now = self._clock()
        for router, (heard, _) in list(self._reports.items()):
            if now - heard > PEER_SECONDS:
                self.forget_router(router)

    def capacity(self, target: Target) -> Capacity | None:
        """The target's capacity; None when it is not known."""
        state = self._states.get(target)
        return state.capacity if state is not None else None

    def load(self, target: Target) -> TargetLoad:
        """The load that is believed. Raises `KeyError` for a target that is not live."""
        return self._states[target].known()

    def utilization(self, target: Target) -> float:
        """Work over capacity; 1 is a full step of prefill, or a full batch, and more waits. 0 without a capacity."""
        state = self._states.get(target)
        if state is None or state.capacity is None:
            return 0.0
        load, capacity = state.known(), state.capacity
        return max(
            load.prefill_tokens / capacity.max_num_batched_tokens if capacity.max_num_batched_tokens else 0.0,
            load.requests / capacity.max_num_seqs if capacity.max_num_seqs else 0.0,
        )

    def snapshot(self) -> Mapping[Target, TargetLoad]:
        """The load that is believed of every live target."""
        return {target: state.known() for target, state in self._states.items()}

    def _take(self, flight: _Flight, part: TargetLoad) -> None:
        # A target that left, and perhaps came back, has no state or another one: this request is not in it.
        state = self._states.get(flight.target)
        if state is not None and state is flight.state:
            state.sent.add(part, -1)
            state.since.add(part, -1)
            self._update(flight.target, state)
        flight.load.prefill_tokens -= part.prefill_tokens

    def _merge_peers(self) -> None:
        for state in self._states.values():
            state.peers = TargetLoad()
        for _, report in self._reports.values():
            for target, load in report.targets:
                live = self._states.get(target)
                if live is not None:
                    live.peers.add(load)

    def _refresh_peers(self) -> None:
        self._merge_peers()
        for target, state in self._states.items():
            self._update(target, state)

    def _update(self, target: Target, state: _State) -> None:
        load = state.known()
        self.work[target] = load.prefill_tokens + RESIDENT_WEIGHT * load.resident_tokens

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the sums are not those of the requests in flight."""
        sums = {target: TargetLoad() for target in self._states}
        for flight in self._flights.values():
            if self._states.get(flight.target) is flight.state and flight.state is not None:
                sums[flight.target].add(flight.load)
        for target, total in sums.items():
            sent = self._states[target].sent
            assert sent == total, f"{target} was sent {sent}, in flight are {total}"
        assert self.work.keys() == self._states.keys(), "work is kept for other targets than the live ones"
