"""One NIXL agent on a thread of its own: posts transfers, watches them to their real end, and remembers peers.

Everything about the agent happens on its thread, so NIXL needs no locks of its own, and a post that copies inside the
call (cross-memory attach) holds up no event loop. What NIXL leaves to its caller is settled here: the idle progress
thread must not spin, a peer that hangs must not hold a request beyond its deadline, and the blocks of a transfer that
was given up stay claimed until its handle is done or has raised.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from core.kv.lease import Deadline
from core.kv.transfer.errors import PeerLost, TransferError, TransferLate
from core.kv.transfer.nixl_load import find_nixl, quiet_agent
from core.kv.transfer.offer import TransferOffer
from core.kv.transfer.pool import KvPool, PoolGeometry
from core.messages.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Peer:
    """What the agent knows of one life of another."""

    agent: str
    offer: TransferOffer
    geometry: PoolGeometry
    lists: dict[bool, Any] = field(default_factory=dict)
    """Prepared descriptors of all its blocks: with touching regions merged (True) or not (False)."""
    active: int = 0
    broken: bool = False


@dataclass(slots=True)
class Active:
    """A posted transfer."""

    handle: Any
    peer: Peer
    deadline: Deadline
    answer: Future[None]
    settled: Callable[[], None]
    posted: float


class NixlAgent:
    """The agent, its thread and its peers."""

    def __init__(self, name: str, pool: KvPool, *, ucx: str = "") -> None:
        """Start the agent and register the pool. `ucx` is passed to UCX ("TLS=tcp").

        Raises `ImportError` without NIXL, `ConfigError` when it does not start.
        """
        self._api, self.package = find_nixl()
        self.name = name
        self.pool = pool
        self._ucx = ucx
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._active: list[Active] = []
        self._peers: dict[str, Peer] = {}
        self._registered: dict[KvPool, Any] = {}
        self._local_lists: dict[bool, Any] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"kv-nixl-{name}", daemon=True)
        self._thread.start()
        try:
            self.metadata: bytes = self.call(self._start).result()
        except BaseException:
            self.close()
            raise

    @property
    def unsettled(self) -> int:
        """Transfers that NIXL still owns, those given up among them."""
        return len(self._active)

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Run `work` on the agent's thread."""
        answer: Future[Any] = Future()

        def job() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                answer.set_exception(error)

        if self._closing:
            answer.set_exception(PeerLost("this worker's KV transfer endpoint is closed"))
        else:
            self._jobs.put(job)
        return answer

    def post(
        self,
        make: Callable[[NixlAgent, Peer], Any],
        offer: TransferOffer,
        geometry: PoolGeometry,
        deadline: Deadline,
        settled: Callable[[], None],
    ) -> Future[None]:
        """Post the transfer whose handle `make` prepares; the answer comes when it is done, or by the deadline.

        `settled` is called exactly once, on the agent's thread, when the transfer can touch no byte any more: at its
        end, or at once when it was never posted. The answer fails with `TransferLate` or `PeerLost`.
        """
        answer: Future[None] = Future()
        answer.set_running_or_notify_cancel()

        def job() -> None:
            try:
                self._post(make, offer, geometry, deadline, settled, answer)
            except TransferError as error:
                settled()
                answer.set_exception(error)
            except Exception as error:  # noqa: BLE001 - NIXL's errors share no base; all mean that the peer is unusable
                settled()
                self._break(offer.incarnation)
                answer.set_exception(_lost(offer, error))

        if self._closing:
            settled()
            answer.set_exception(PeerLost("this worker's KV transfer endpoint is closed"))
        else:
            self._jobs.put(job)
        return answer

    def known(self) -> list[str]:
        """Names of the peers' agents that are loaded, on the agent's thread."""
        return [peer.agent for peer in self._peers.values()]

    def register(self, pool: KvPool) -> None:
        """Register more memory, on the agent's thread: a scratch pool."""
        regions = [(start, size, pool.device, "") for start, size in pool.spans]
        self._registered[pool] = self._agent.register_memory(regions, pool.memory.upper())

    def unregister(self, pool: KvPool) -> None:
        """Take memory out again, on the agent's thread. Nothing may be in flight to it."""
        self._agent.deregister_memory(self._registered.pop(pool))

    def forget(self, incarnation: str) -> None:
        """Drop what is known of one life of a peer, as soon as no transfer needs it. Unknown ones are no error."""
        with suppress(PeerLost):
            self.call(lambda: self._break(incarnation))

    def close(self, patience: float = 5.0) -> bool:
        """Take the agent down, so that no peer can reach the pool; whether that was possible.

        Transfers that were given up get `patience` seconds to end. When they do not, the agent and the pool's memory
        stay until they do (a peer that hangs may wake up and write), and only this process's end is sure to end them.
        """
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            log.warning(
                "NIXL agent %s: %d transfers given up are still owned by NIXL; the agent and the KV memory stay until "
                "their peers answer or die",
                self.name,
                self.unsettled,
            )
        return not self._thread.is_alive()

    def rows(self, rows: Any, memory: str, device: int, column: int) -> Any:
        """NIXL descriptors of one side of a table of copies (source, target, bytes)."""
        import numpy as np

        table = np.empty((len(rows), 3), np.uint64)
        table[:, 0], table[:, 1], table[:, 2] = rows[:, column], rows[:, 2], device
        return self._agent.get_xfer_descs(table, memory)

    def make_blocks(self, operation: str, peer: Peer, local: Any, remote: Any, regions: Any) -> Any:
        """A transfer of whole blocks or whole regions of blocks, by index into descriptors prepared once a peer.

        `local` and `remote` are block numbers as int32 arrays; `regions` is None for whole blocks.
        """
        import numpy as np

        mine, theirs = self.pool, peer.geometry
        merged = regions is None and [p[2] for p in mine.whole] == [p[2] for p in theirs.whole]
        here = self._local_lists.get(merged)
        if here is None:
            here = self._local_lists[merged] = self._prepare("NIXL_INIT_AGENT", mine, merged)
        there = peer.lists.get(merged)
        if there is None:
            there = peer.lists[merged] = self._prepare(peer.agent, theirs, merged)
        count = len(mine.whole) if merged else len(mine.regions)
        chosen = np.arange(count, dtype=np.int32) if regions is None else np.asarray(regions, np.int32)
        if count == 1:
            return self._agent.make_prepped_xfer(operation, here, local, there, remote)
        local = (chosen[:, None] * np.int32(mine.num_blocks) + local).reshape(-1)
        remote = (chosen[:, None] * np.int32(theirs.num_blocks) + remote).reshape(-1)
        return self._agent.make_prepped_xfer(operation, here, local, there, remote)

    def make_rows(self, operation: str, peer: Peer, rows: Any, pool: KvPool) -> Any:
        """A transfer of byte ranges (local address, remote address, bytes)."""
        local = self.rows(rows, pool.memory.upper(), pool.device, 0)
        remote = self.rows(rows, peer.geometry.memory.upper(), peer.geometry.device, 1)
        return self._agent.initialize_xfer(operation, local, remote, peer.agent)

    def _prepare(self, agent: str, pool: PoolGeometry, merged: bool) -> Any:
        import numpy as np

        pattern = pool.whole if merged else pool.by_region
        strided = np.array(
            [
                (
                    pool.regions[region].address + offset,
                    length,
                    pool.device,
                    pool.regions[region].stride,
                    pool.num_blocks,
                )
                for region, offset, length in pattern
            ],
            np.uint64,
        )
        return self._agent.prep_xfer_dlist(agent, strided, pool.memory.upper())

    def _start(self) -> bytes:
        if self.pool.enter_thread is not None:
            self.pool.enter_thread()
        try:
            self._agent = quiet_agent(self._api, self.name)
            self._agent.create_backend("UCX", {"engine_config": self._ucx} if self._ucx else {})
            self.register(self.pool)
            return bytes(self._agent.get_agent_metadata())
        except Exception as error:
            raise ConfigError(
                f"NIXL ({self.package}) does not start: {error}. Set kv-transfer: tcp to do without it; if the text "
                "speaks of a configuration file, set HOME or NIXL_CONFIG_FILE to a readable place"
            ) from error

    def _peer(self, offer: TransferOffer, geometry: PoolGeometry) -> Peer:
        """The peer, made known first if need be; an earlier life of the same worker is dropped."""
        peer = self._peers.get(offer.incarnation)
        if peer is not None and not peer.broken:
            return peer
        if peer is not None:
            raise PeerLost(f"the NIXL agent of {offer.worker_id} has failed and is being taken out of use")
        if offer.nixl is None:
            raise PeerLost(f"{offer.worker_id} offers no NIXL agent")
        for incarnation, other in list(self._peers.items()):
            if other.offer.worker_id == offer.worker_id and other.offer.layout.tp_rank == offer.layout.tp_rank:
                self._break(incarnation)
        name = self._agent.add_remote_agent(offer.nixl.metadata)
        peer = Peer(name.decode() if isinstance(name, bytes) else name, offer, geometry)
        self._peers[offer.incarnation] = peer
        return peer

    def _post(
        self,
        make: Callable[[NixlAgent, Peer], Any],
        offer: TransferOffer,
        geometry: PoolGeometry,
        deadline: Deadline,
        settled: Callable[[], None],
        answer: Future[None],
    ) -> None:
        if deadline.passed():
            raise TransferLate(f"the deadline for KV of {offer.worker_id} passed before the transfer began")
        peer = self._peer(offer, geometry)
        handle = make(self, peer)
        try:
            state = self._agent.transfer(handle)
        except BaseException:
            handle.release()
            raise
        active = Active(handle, peer, deadline, answer, settled, time.monotonic())
        peer.active += 1
        self._active.append(active)
        if state == "DONE":
            self._settle(active, None)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._poll())
            except queue.Empty:
                continue
            if job is None:
                break
            job()
        while self._active:
            time.sleep(self._poll() or 0)
        self._stop()

    def _poll(self) -> float | None:
        """Look after the posted transfers; seconds until that is due again."""
        if not self._active:
            return None
        now = time.monotonic()
        wait = 0.02
        for active in list(self._active):
            try:
                state = self._agent.check_xfer_state(active.handle)
            except Exception as error:  # noqa: BLE001 - NIXL's errors share no base; all mean that the transfer is over
                active.peer.broken = True
                self._settle(active, _lost(active.peer.offer, error))
                continue
            if state == "DONE":
                self._settle(active, None)
            elif state != "PROC":
                active.peer.broken = True
                self._settle(active, _lost(active.peer.offer, RuntimeError(f"NIXL answered {state}")))
            elif active.answer.done():
                continue
            elif active.deadline.passed():
                offer = active.peer.offer
                active.answer.set_exception(
                    TransferLate(
                        f"KV of {offer.worker_id} did not move before the deadline; its target blocks are in "
                        "quarantine until NIXL lets go of them"
                    )
                )
            else:
                wait = min(wait, 20e-6 if now - active.posted < 2e-3 else 200e-6)
        return wait if self._active else None

    def _settle(self, active: Active, error: TransferError | None) -> None:
        self._active.remove(active)
        active.peer.active -= 1
        try:
            active.handle.release()
        except Exception as failure:  # noqa: BLE001 - the transfer is over; NIXL retries the release when it is torn down
            log.warning("NIXL agent %s: a finished transfer could not be released: %s", self.name, failure)
        active.settled()
        if not active.answer.done():
            late = active.deadline.passed()
            if error is None and late:
                error = TransferLate(f"KV of {active.peer.offer.worker_id} arrived after the deadline")
            if error is None:
                active.answer.set_result(None)
            else:
                active.answer.set_exception(error)
        if active.peer.broken:
            self._break(active.peer.offer.incarnation)

    def _break(self, incarnation: str) -> None:
        """Use the peer no more; forget it once its last transfer has ended."""
        peer = self._peers.get(incarnation)
        if peer is None:
            return
        peer.broken = True
        if peer.active:
            return
        del self._peers[incarnation]
        for prepared in peer.lists.values():
            prepared.release()
        try:
            self._agent.remove_remote_agent(peer.agent)
        except Exception as error:  # noqa: BLE001 - it is gone already, which is what was wanted
            log.debug("NIXL agent %s: removing %s: %s", self.name, peer.agent, error)

    def _stop(self) -> None:
        """Take everything down in the order that leaves no peer a way to the memory."""
        for incarnation in list(self._peers):
            self._break(incarnation)
        for prepared in self._local_lists.values():
            prepared.release()
        self._local_lists.clear()
        for registered in self._registered.values():
            self._agent.deregister_memory(registered)
        self._registered.clear()
        self._agent = None


def _lost(offer: TransferOffer, error: Exception) -> PeerLost:
    return PeerLost(f"NIXL lost {offer.worker_id}: {type(error).__name__}: {error}")
