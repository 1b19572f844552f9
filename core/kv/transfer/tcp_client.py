"""The side that wants blocks moved, over TCP. Blocking calls for the endpoint's threads, each bounded by a deadline."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from core.kv.lease import Deadline
from core.kv.transfer import wire
from core.kv.transfer.errors import PeerLost, TransferError, TransferLate, TransferRefused
from core.kv.transfer.offer import TransferOffer
from core.kv.transfer.pool import Pattern
from core.kv.transfer.side import LocalSide

MAX_IDLE = 8
"""Connections kept for reuse, a peer."""

T = TypeVar("T")


class Cancel:
    """Lets another thread end a blocking call at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.fired = False

    def attach(self, connection: socket.socket | None) -> None:
        """Name the socket that the call waits on. Raises `TransferLate` when it is too late for it."""
        with self._lock:
            if self.fired and connection is not None:
                raise TransferLate("the KV transfer was given up")
            self._socket = connection

    def fire(self) -> None:
        """Wake the call; it ends with `TransferLate`."""
        with self._lock:
            self.fired = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


class TcpClient:
    """Connections to peers, kept by the life of the peer. Thread-safe."""

    def __init__(self, secret: bytes, worker_id: str) -> None:
        self._secret = secret
        self._worker_id = worker_id
        self._lock = threading.Lock()
        self._idle: dict[str, list[socket.socket]] = {}
        self._closed = False

    def start(self, offer: TransferOffer, message: wire.Read) -> socket.socket | None:
        """Send a read's request from the event loop, over a kept connection, while its thread is being woken.

        None when there is no connection, or it would not take the request at once.
        """
        connection = self._take(offer)
        if connection is None:
            return None
        data = wire.frame(message)
        try:
            if connection.send(data, socket.MSG_DONTWAIT) == len(data):
                return connection
        except OSError:
            # Dead, or full: the thread opens another and finds out about the peer.
            pass
        connection.close()
        return None

    def read(
        self,
        offer: TransferOffer,
        message: wire.Read,
        side: LocalSide,
        blocks: Sequence[int],
        pattern: Pattern,
        deadline: Deadline,
        cancel: Cancel,
        started: socket.socket | None = None,
    ) -> None:
        """Fetch the blocks of `message` into `blocks` of `side`, which need not be the endpoint's own pool.

        `started` is what `start` gave: there the request has been sent already.
        """

        def talk(connection: socket.socket) -> None:
            if connection is not started:
                wire.send_message(connection, message)
            _accept(wire.receive_message(connection))
            for buffers in side.incoming(blocks, pattern):
                wire.receive_buffers(connection, buffers)
                if deadline.passed():
                    raise TransferLate("the deadline passed while KV was arriving")
            _accept(wire.receive_message(connection))

        self._converse(offer, talk, deadline, cancel, started=started)

    def write(
        self,
        offer: TransferOffer,
        message: wire.Write,
        side: LocalSide,
        blocks: Sequence[int],
        pattern: Pattern,
        deadline: Deadline,
        cancel: Cancel,
    ) -> None:
        """Send `blocks` of `side` into the blocks of `message`."""

        def talk(connection: socket.socket) -> None:
            wire.send_message(connection, message)
            _accept(wire.receive_message(connection))
            for buffers in side.outgoing(blocks, pattern):
                wire.send_buffers(connection, buffers)
                if deadline.passed():
                    raise TransferLate("the deadline passed while KV was being sent")
            _accept(wire.receive_message(connection))

        self._converse(offer, talk, deadline, cancel)

    def ask(self, offer: TransferOffer, message: wire.Confirm, deadline: Deadline, cancel: Cancel) -> None:
        """Ask a question that is answered with yes or a refusal."""

        def talk(connection: socket.socket) -> None:
            wire.send_message(connection, message)
            _accept(wire.receive_message(connection))

        self._converse(offer, talk, deadline, cancel)

    async def ask_here(self, offer: TransferOffer, message: wire.Confirm, deadline: Deadline) -> bool:
        """As `ask`, on the event loop over a kept connection, which spares two changes of thread; False without one.

        Also False when the kept connection turns out to be dead: `ask` then finds out about the peer.
        """
        connection = self._take(offer)
        if connection is None:
            return False
        loop = asyncio.get_running_loop()
        kept = False
        try:
            connection.setblocking(False)
            async with asyncio.timeout(deadline.remaining()):
                await loop.sock_sendall(connection, wire.frame(message))
                data = b""
                while (reply := wire.unframe(data)) is None:
                    more = await loop.sock_recv(connection, 4096)
                    if not more:
                        return False
                    data += more
            connection.setblocking(True)
            kept = True
        except TimeoutError as error:
            raise TransferLate(f"{offer.worker_id} did not confirm before the deadline that its KV was held") from error
        except OSError:
            return False
        finally:
            if not kept:
                connection.close()
        self._put(offer, connection)
        _accept(reply)
        return True

    def begin(self, offer: TransferOffer, message: wire.Begin, deadline: Deadline, cancel: Cancel) -> socket.socket:
        """Announce a write past TCP; the connection over which `end` must be said."""

        def talk(connection: socket.socket) -> None:
            wire.send_message(connection, message)
            _accept(wire.receive_message(connection))

        return self._converse(offer, talk, deadline, cancel, keep=True)

    def end(
        self, offer: TransferOffer, connection: socket.socket, session: str, deadline: Deadline, cancel: Cancel
    ) -> None:
        """Say that an announced write is over. Raises `TransferLate` when the session ended before it."""
        try:
            cancel.attach(connection)
            wire.limit_waiting(connection, deadline.remaining())
            wire.send_message(connection, wire.End(session))
            _accept(wire.receive_message(connection))
            cancel.attach(None)
        except TransferRefused:
            self._put(offer, connection)
            raise
        except (OSError, PeerLost) as error:
            connection.close()
            raise _translate(offer, error, deadline, cancel) from error
        except TransferError:
            connection.close()
            raise
        self._put(offer, connection)

    def has_met(self, incarnation: str) -> bool:
        """Whether this life of a peer has proved that it knows the secret, and is not forgotten."""
        with self._lock:
            return incarnation in self._idle

    def forget(self, incarnation: str) -> None:
        """Close the idle connections to one life of a peer."""
        with self._lock:
            idle = self._idle.pop(incarnation, [])
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close every idle connection; busy ones close when their call ends. Idempotent."""
        with self._lock:
            self._closed = True
            lives = list(self._idle)
        for incarnation in lives:
            self.forget(incarnation)

    def _converse(
        self,
        offer: TransferOffer,
        talk: Callable[[socket.socket], None],
        deadline: Deadline,
        cancel: Cancel,
        *,
        keep: bool = False,
        started: socket.socket | None = None,
    ) -> socket.socket:
        """Hold a conversation on a connection of the pool, or on a new one when a kept one has died meanwhile."""
        while True:
            if deadline.passed():
                if started is not None:
                    started.close()
                raise TransferLate(f"the deadline for KV of {offer.worker_id} passed before the transfer began")
            reused, started = started or self._take(offer), None
            connection = reused or self._connect(offer, deadline, cancel)
            try:
                cancel.attach(connection)
                wire.limit_waiting(connection, deadline.remaining())
                talk(connection)
                cancel.attach(None)
            except TransferRefused:
                # The answer to a question: the connection is in step.
                self._put(offer, connection)
                raise
            except (OSError, PeerLost) as error:
                connection.close()
                if reused is not None and not cancel.fired and not deadline.passed():
                    self.forget(offer.incarnation)
                    continue
                raise _translate(offer, error, deadline, cancel) from error
            except BaseException:
                connection.close()
                raise
            if not keep:
                self._put(offer, connection)
            return connection

    def _connect(self, offer: TransferOffer, deadline: Deadline, cancel: Cancel) -> socket.socket:
        address = (offer.tcp.host, offer.tcp.port)
        limit = min(deadline.remaining(), wire.HANDSHAKE_SECONDS)
        try:
            connection = socket.create_connection(address, timeout=max(limit, 0.001))
        except OSError as error:
            raise _translate(offer, error, deadline, cancel) from error
        try:
            cancel.attach(connection)
            connection.settimeout(None)
            wire.tune(connection)
            wire.limit_waiting(connection, limit)
            wire.prove_client(connection, self._secret, offer.incarnation, self._worker_id)
        except OSError as error:
            connection.close()
            raise _translate(offer, error, deadline, cancel) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _take(self, offer: TransferOffer) -> socket.socket | None:
        with self._lock:
            idle = self._idle.get(offer.incarnation)
            return idle.pop() if idle else None

    def _put(self, offer: TransferOffer, connection: socket.socket) -> None:
        with self._lock:
            idle = self._idle.setdefault(offer.incarnation, [])
            if not self._closed and len(idle) < MAX_IDLE:
                idle.append(connection)
                return
        connection.close()


def _accept(reply: wire.Message) -> None:
    if not isinstance(reply, wire.Reply):
        raise PeerLost(f"expected a reply of the KV peer, found {type(reply).__name__}")
    if reply.late:
        raise TransferLate(reply.refused)
    if reply.refused:
        raise TransferRefused(reply.refused)


def _translate(offer: TransferOffer, error: Exception, deadline: Deadline, cancel: Cancel) -> TransferError:
    """Say what a failed socket means for the transfer."""
    if cancel.fired or deadline.passed() or isinstance(error, BlockingIOError | TimeoutError):
        return TransferLate(f"KV of {offer.worker_id} did not move before the deadline")
    return PeerLost(
        f"the KV transfer endpoint of {offer.worker_id} at {offer.tcp.host}:{offer.tcp.port} is lost: {error}"
    )
