"""Keeps a Router's picture of the deployment true: which workers are live, what they hold and do, who else routes.

Everything comes in from outside, by watching instances and by subscriptions; the decisions are `core.routing`'s. What
is lost on the way is asked for again, so every message may be late, doubled, garbled or missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec

from core.components.card import WorkerCard
from core.components.router_messages import (
    EVENTS,
    INFLIGHT,
    LOADS,
    RENEWAL_SECONDS,
    FeedRequest,
    LoadReport,
    RouterCounters,
    RouterState,
    subject,
)
from core.kv import KvReplayRequest, Target
from core.messages import ConfigError, EngineError, RequestContext
from core.routing import Capacity, InflightReport, PolicyRegistry, RouterConfig, Selector
from core.runtime import Client, Instance, Runtime, Subscription

log = logging.getLogger("dynamo.router")

T = TypeVar("T")

TICK_SECONDS = 1.0
SHARE_SECONDS = 0.05
"""At least this long between two reports to other Routers; what changes meanwhile goes into the next."""
ANSWER_SECONDS = 10.0
"""A worker that has not answered for this long will not; it is asked again."""
SHARE_BEAT_SECONDS = 3.0
"""Reports go out this often when nothing changes; see `PEER_SECONDS` in core/routing/load.py."""


class Fleet:
    """The workers and Routers around one Router. `start`, then read `selector`; its owner ends it with `close`."""

    def __init__(
        self,
        config: RouterConfig,
        runtime: Runtime,
        namespace: str,
        router: str,
        *,
        workers: Client,
        feed: Client,
        peers: Client,
        fail: Callable[[BaseException], None],
        registry: PolicyRegistry | None = None,
    ) -> None:
        """`workers` and `feed`: the Workers' endpoints; `peers`: the Routers'. `fail` is told of a defect."""
        self.counters = RouterCounters()
        self.refused: dict[str, str] = {}
        """Live workers that nothing is sent to, and why."""
        self.ranks: dict[str, int] = {}
        """Data-parallel ranks of the workers that requests can go to."""
        self._config = config
        self._runtime = runtime
        self._namespace = namespace
        self._router = router
        self._workers = workers
        self._feed = feed
        self._peers = peers
        self._fail = fail
        self._registry = registry
        self._selector: Selector | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: dict[Target, asyncio.Task[None]] = {}
        self._subscriptions: list[Subscription] = []
        self._others: set[str] = set()
        self._changed = asyncio.Event()
        self._follows = config.router_events and config.router not in _WITHOUT_EVENTS

    @property
    def selector(self) -> Selector:
        """Who decides. Only after `start`."""
        assert self._selector is not None, "the fleet has not been started"
        return self._selector

    async def start(self, least: int, report: Callable[[str], None]) -> WorkerCard:
        """Returns, with the card of one, when `least` workers are live. `report` is told what is waited for.

        Raises `ConfigError` when workers differ in block size or cannot do what the policy needs.
        """
        for kind, take in ((EVENTS, self._on_events), (LOADS, self._on_load), (INFLIGHT, self._on_inflight)):
            subscription = await self._runtime.subscribe(subject(self._namespace, kind))
            self._subscriptions.append(subscription)
            self._spawn(self._follow(subscription, take), f"{kind} of {self._router}")
        live = len(self._workers.instances())
        if live < least:
            report(f"waiting for {least} workers, {live} are live")
        instances = await self._workers.wait_for_instances(least)
        cards = {instance.id: WorkerCard.decode(instance.metadata) for instance in instances}
        first = next(iter(cards.values()))
        self._selector = self._make_selector(first)
        for worker, card in cards.items():
            if (why := self._misfit(card)) is not None:
                raise ConfigError(f"{worker} cannot work beside {next(iter(cards))}: {why}")
        for instance in instances:
            self._add(instance)
        self._spawn(self._watch_workers(), f"workers of {self._router}")
        self._spawn(self._watch_peers(), f"peers of {self._router}")
        self._spawn(self._tick(), f"tick of {self._router}")
        self._spawn(self._share(), f"in-flight work of {self._router}")
        return first

    async def close(self) -> None:
        """Ends every task and subscription. Idempotent."""
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()

    def changed(self) -> None:
        """The work in flight has changed: the other Routers, if there are any, will be told."""
        if self._others:
            self._changed.set()

    def lost(self, worker: str) -> None:
        """A request found the worker gone: nothing more goes there, whether discovery has noticed yet or not."""
        self.counters.lost += 1
        self._remove(worker)

    def state(self) -> RouterState:
        """What is known now."""
        selector = self.selector
        return RouterState(
            router=self._router,
            block_size=selector.block_size,
            peers=len(self._others),
            routing=selector.state(),
            refused=self.refused,
            counters=self.counters,
            events=selector.follower.counters,
            index=selector.index.counters,
        )

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the selector contradicts itself, or a worker is both refused and routed to."""
        self.selector.check_integrity()
        routed = {target.worker for target in self.selector.targets}
        assert routed == set(self.ranks), f"{routed} are routed to, {set(self.ranks)} are known"
        assert not routed & set(self.refused), f"{routed & set(self.refused)} are refused and routed to"
        assert set(self._asking.values()) <= self._tasks, "an answer is waited for by nobody"

    def _make_selector(self, card: WorkerCard) -> Selector:
        info = card.info
        if self._config.router == "kv" and not info.block_size:
            raise ConfigError(
                f"The policy 'kv' routes by what KV caches hold, and engine '{info.engine}' has none; "
                "choose --Router.router=least-loaded."
            )
        self._follows = self._follows and card.capabilities.kv_events
        return Selector(
            self._config,
            info.block_size or 1,  # an engine without KV blocks: nobody looks at hashes then
            router=self._router,
            ask=self._ask if self._follows else None,
            registry=self._registry,
        )

    def _misfit(self, card: WorkerCard) -> str | None:
        """Why nothing can be sent to a worker; None when all is well."""
        ours, theirs = self.selector.block_size, card.info.block_size or 1
        if theirs != ours:
            return (
                f"its KV blocks have {theirs} tokens and theirs have {ours}, so their caches cannot be compared; "
                "start all workers with the same block-size."
            )
        if self._follows and not card.capabilities.kv_events:
            return (
                f"its engine '{card.info.engine}' publishes no KV events and the others' does; use one engine, "
                "or set Router.router-events to false."
            )
        return None

    def _add(self, instance: Instance) -> None:
        try:
            card = WorkerCard.decode(instance.metadata)
        except msgspec.MsgspecError as error:
            why: str | None = f"what it says of itself cannot be read ({error}); is it of another version?"
        else:
            why = self._misfit(card)
        if why is not None:
            if instance.id not in self.refused:
                log.error("Nothing is sent to %s: %s", instance.id, why)
            self.refused[instance.id] = why
            self._remove(instance.id)
            return
        self.refused.pop(instance.id, None)
        self.selector.add_worker(instance.id, Capacity.of(card.info), ranks=card.info.data_parallel_size)
        if instance.id not in self.ranks and not self._follows:
            self._renew(instance.id)
        self.ranks[instance.id] = card.info.data_parallel_size

    def _remove(self, worker: str) -> None:
        self.ranks.pop(worker, None)
        self.selector.remove_worker(worker)

    async def _watch_workers(self) -> None:
        async with aclosing(self._workers.watch()) as events:
            async for event in events:
                if event.live:
                    self._add(event.instance)
                else:
                    self.refused.pop(event.instance.id, None)
                    self._remove(event.instance.id)

    async def _watch_peers(self) -> None:
        async with aclosing(self._peers.watch()) as events:
            async for event in events:
                router = event.instance.id
                if router == self._router:
                    continue
                if event.live:
                    self._others.add(router)
                    self._changed.set()
                else:
                    self._others.discard(router)
                    self.selector.loads.forget_router(router)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        renewal = loop.time() + RENEWAL_SECONDS
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.selector.tick()
            if loop.time() >= renewal:
                renewal = loop.time() + RENEWAL_SECONDS
                for worker in self.ranks:
                    self._renew(worker)

    async def _share(self) -> None:
        own = subject(self._namespace, INFLIGHT, self._router)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SHARE_BEAT_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            if self._others:
                await self._runtime.publish(own, _encode(self.selector.loads.share()))
                await asyncio.sleep(SHARE_SECONDS)

    async def _follow(self, subscription: Subscription, take: Callable[[bytes], None]) -> None:
        async for _, payload in subscription:
            if self._selector is not None:
                take(payload)

    def _on_events(self, payload: bytes) -> None:
        if self._follows:
            self.selector.follower.offer_encoded(payload)

    def _on_load(self, payload: bytes) -> None:
        report = self._readable(_decode_load, payload)
        for load in report.ranks if report is not None else ():
            self.selector.report(Target(report.worker, load.data_parallel_rank), load)  # type: ignore[union-attr]

    def _on_inflight(self, payload: bytes) -> None:
        report = self._readable(_decode_inflight, payload)
        # One that left may still have a report on its way.
        if report is not None and report.router in self._others:
            self.selector.merge(report)

    def _readable(self, decode: Callable[[bytes], T], payload: bytes) -> T | None:
        try:
            return decode(payload)
        except msgspec.MsgspecError as error:
            self.counters.unreadable += 1
            log.warning("A message of %d bytes cannot be read and is left out: %s", len(payload), error)
            return None

    def _ask(self, request: KvReplayRequest) -> None:
        target = Target(request.worker, request.rank)
        if target not in self._asking:
            asked = FeedRequest(events=True, replay=request)
            task = self._asking[target] = self._spawn(self._call(request.worker, asked), f"replay of {target}")
            task.add_done_callback(lambda _: self._asking.pop(target))

    def _renew(self, worker: str) -> None:
        self._spawn(self._call(worker, FeedRequest(events=self._follows)), f"feed of {worker}")

    async def _call(self, worker: str, request: FeedRequest) -> None:
        context = RequestContext(request_id=f"{self._router}-feed")
        try:
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                aclosing(self._feed.stream(request, context, worker)) as messages,
            ):
                async for message in messages:
                    self.selector.follower.offer_encoded(message)
        except (EngineError, TimeoutError) as error:
            # It may be about to leave, or not be served yet: the follower asks again, and so does the next renewal.
            log.debug("%s did not answer: %r", worker, error)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._fail(error)


_WITHOUT_EVENTS = frozenset({"round-robin", "random", "least-loaded", "power-of-two"})
"""Policies that look at no cache, so that nobody needs to publish anything of it. Installed ones may."""

_encode = msgspec.msgpack.Encoder().encode
_decode_load = msgspec.msgpack.Decoder(LoadReport).decode
_decode_inflight = msgspec.msgpack.Decoder(InflightReport).decode
