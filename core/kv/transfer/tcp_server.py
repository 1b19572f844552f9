"""The side that holds memory, over TCP: serves blocks and answers for sessions, with a thread a connection."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress

from core.kv.transfer import wire
from core.kv.transfer.errors import PeerLost, TransferError, TransferLate, TransferRefused
from core.kv.transfer.grants import Access
from core.kv.transfer.inflight import Hold
from core.kv.transfer.pool import Pattern
from core.kv.transfer.side import LocalSide

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
_SMALL = 256 << 10
"""Bytes of a read that count as little."""
WRITER_GRACE = 1.0
"""Seconds for which the targets of a dead writer stay untouched: what it had in the network may still arrive."""


class TcpServer:
    """Listens, lets in who knows the secret, and serves them until `close`."""

    def __init__(self, side: LocalSide, secret: bytes, incarnation: str, host: str, port: int = 0) -> None:
        """Bind and start listening. Raises `OSError` when the address cannot be bound."""
        self._side = side
        self._secret = secret
        self._incarnation = incarnation
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True)
        self._acceptor.start()

    @property
    def connections(self) -> int:
        """Peers connected now."""
        with self._lock:
            return len(self._connections)

    def close(self) -> None:
        """Stop listening, end every connection and wait for the threads. Idempotent."""
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for thread in self.drop():
            thread.join()

    def drop(self) -> list[threading.Thread]:
        """Cut every connection; the threads that are about to end."""
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            return list(self._connections.values())

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    # Out of descriptors, or the peer left the queue: neither is a reason to stop listening.
                    log.warning("KV transfer: a connection could not be accepted: %s", error)
                    self._closing.wait(0.05)
                continue
            with self._lock:
                if len(self._connections) >= MAX_CONNECTIONS:
                    log.warning("KV transfer: %s turned away, %d connections are open", address, MAX_CONNECTIONS)
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection, address), name=f"kv-tcp-{address}", daemon=True
                )
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket, address: object) -> None:
        begun: dict[str, Hold] = {}
        try:
            wire.tune(connection)
            wire.limit_waiting(connection, wire.HANDSHAKE_SECONDS)
            peer = wire.prove_server(connection, self._secret, self._incarnation)
            log.debug("KV transfer: %s connected from %s", peer, address)
            while not self._closing.is_set():
                wire.wait_forever(connection)
                self._answer(connection, wire.receive_message(connection), begun)
        except TransferRefused as error:
            log.warning("KV transfer: refused %s: %s", address, error)
        except (PeerLost, OSError) as error:
            log.debug("KV transfer: connection from %s ended: %s", address, error)
        except Exception:
            log.exception("KV transfer: a request from %s met a defect; its connection is closed", address)
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()
            if begun:
                log.warning("KV transfer: a writer at %s left without saying that its write has ended", address)
                self._closing.wait(WRITER_GRACE)
                for hold in begun.values():
                    hold.release()

    def _answer(self, connection: socket.socket, message: wire.Message, begun: dict[str, Hold]) -> None:
        try:
            match message:
                case wire.Read():
                    self._send_blocks(connection, message)
                case wire.Write():
                    self._take_blocks(connection, message)
                case wire.Begin(session, blocks):
                    if session in begun:
                        raise TransferRefused(f"a write for KV session {session!r} is under way on this connection")
                    begun[session], _ = self._side.admit(session, blocks, Access.WRITE)
                case wire.End(session):
                    hold = begun.pop(session, None)
                    if hold is None:
                        raise TransferRefused(f"no write for KV session {session!r} was begun on this connection")
                    hold.release()
                    self._side.grants.require(session, (), Access.WRITE)
                case wire.Confirm(session, blocks):
                    self._side.grants.require(session, blocks, Access.READ)
                case _:
                    raise TransferRefused(f"a client may not send {type(message).__name__}")
        except TransferError as error:
            if isinstance(error, PeerLost):
                raise
            wire.send_message(connection, wire.Reply(refused=str(error), late=isinstance(error, TransferLate)))
        else:
            wire.send_message(connection, wire.Reply())

    def _send_blocks(self, connection: socket.socket, message: wire.Read) -> None:
        """Send the blocks; the answer after them says whether they were held until the last byte was read."""
        pattern = self._pattern(message.pattern)
        hold, left = self._side.admit(message.session, message.blocks, Access.READ)
        try:
            wire.limit_waiting(connection, min(left, message.seconds))
            # Little is sent in one go, so that the reader is woken once; much must not wait for a full segment.
            small = len(message.blocks) * sum(length for _, _, length in pattern) <= _SMALL
            wire.send_message(connection, wire.Reply(), more=True)
            for buffers in self._side.outgoing(message.blocks, pattern):
                wire.send_buffers(connection, buffers, more=small)
            self._side.grants.require(message.session, message.blocks, Access.READ)
        finally:
            hold.release()

    def _take_blocks(self, connection: socket.socket, message: wire.Write) -> None:
        """Say go, take the bytes, and answer whether the session was alive until the last of them was in place."""
        pattern = self._pattern(message.pattern)
        hold, left = self._side.admit(message.session, message.blocks, Access.WRITE)
        try:
            wire.limit_waiting(connection, min(left, message.seconds))
            wire.send_message(connection, wire.Reply())
            for buffers in self._side.incoming(message.blocks, pattern):
                wire.receive_buffers(connection, buffers)
            self._side.grants.require(message.session, message.blocks, Access.WRITE)
        finally:
            hold.release()

    def _pattern(self, pattern: Pattern | None) -> Pattern:
        """The pattern asked for, held against the pool. Blocks need no check: the grant names those of the pool."""
        pool = self._side.pool
        if pattern is None:
            return pool.whole
        try:
            pool.check_pattern(pattern)
        except ValueError as error:
            raise TransferRefused(f"the KV request does not fit this pool: {error}") from error
        return pattern
