"""Frames of the TCP transport: a length, a msgpack message, and, after some, the bytes of blocks.

A connection starts with a challenge in both directions, so that neither side serves or believes a stranger: each proves
with an HMAC over both nonces that it knows the deployment's secret. What follows is not encrypted: like NIXL's, this
traffic belongs on a trusted network.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Sequence

import msgspec

from core.kv.transfer.errors import PeerLost, TransferRefused
from core.kv.transfer.pool import Pattern

VERSION = 1
HANDSHAKE_SECONDS = 5.0
MAX_MESSAGE = 32 << 20
"""Bytes of one message. Blocks do not count: they follow it."""
_HANDSHAKE_BYTES = 4096
"""The same for somebody who has proved nothing yet."""
WINDOW = 128
"""Buffers handed to one system call: enough to fill a socket, few enough to rebuild cheaply after a partial one."""
_FOREVER = struct.pack("ll", 0, 0)
_ALIGNMENT = 64
"""Messages fill whole cache lines, so that the blocks after them are copied to and from aligned addresses."""
_LARGE = 16 << 10
"""Buffers of this size are received one by one: a list of them only makes each call touch more of the caches."""
_CUT = "the peer closed the connection in the middle of a transfer"
_LENGTH = struct.Struct(">I")


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The server's first word."""

    version: int
    incarnation: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, tag="proof"):
    """The client's answer."""

    incarnation: str
    """The life of the server that the client means to reach."""
    worker_id: str
    nonce: bytes
    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The server's own proof."""

    mac: bytes


class Read(msgspec.Struct, frozen=True, tag="read", omit_defaults=True):
    """Send the pieces of `pattern` of these blocks, block after block. None: whole blocks, region after region."""

    session: str
    blocks: Sequence[int]
    seconds: float
    """After which the reader will have gone."""
    pattern: Pattern | None = None


class Write(msgspec.Struct, frozen=True, tag="write", omit_defaults=True):
    """Take the bytes that follow into these blocks."""

    session: str
    blocks: Sequence[int]
    seconds: float
    pattern: Pattern | None = None


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """A write past this connection (NIXL) is about to start; it may go on until `End` or until the writer is dead."""

    session: str
    blocks: Sequence[int]


class End(msgspec.Struct, frozen=True, tag="end"):
    """The announced write can touch the blocks no more. Answered with whether the session was alive throughout."""

    session: str


class Confirm(msgspec.Struct, frozen=True, tag="confirm"):
    """Were these blocks held for the session until now? Asked after a read past this connection."""

    session: str
    blocks: Sequence[int]


class Reply(msgspec.Struct, frozen=True, tag="reply", omit_defaults=True):
    """How it went. A successful read is answered twice: before the blocks and after them."""

    refused: str = ""
    """Why not; empty when all is well."""
    late: bool = False
    """The refusal is about time."""


Message = Challenge | Proof | Welcome | Read | Write | Begin | End | Confirm | Reply

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    """A message as it is sent: its length, itself, and zeros up to the alignment."""
    body = _encoder.encode(message)
    return (_LENGTH.pack(len(body)) + body).ljust(_padded(len(body)), b"\0")


def unframe(data: bytes) -> Message | None:
    """The message that `data` is; None while it is incomplete. Raises `PeerLost` for what is no message."""
    if len(data) < _LENGTH.size:
        return None
    length = _length(data, MAX_MESSAGE)
    return _decode(data[_LENGTH.size : _LENGTH.size + length]) if len(data) >= _padded(length) else None


def send_message(sock: socket.socket, message: Message, *, more: bool = False) -> None:
    """Send a message. `more`: it may wait for what is sent next, so that the peer is woken once."""
    sock.sendall(frame(message), socket.MSG_MORE if more else 0)


def receive_message(sock: socket.socket, limit: int = MAX_MESSAGE) -> Message:
    """Receive a message of at most `limit` bytes.

    Raises `PeerLost` at the end of the stream or for bytes that are no message.
    """
    data = bytearray(_ALIGNMENT)
    receive_buffers(sock, [memoryview(data)])
    length = _length(data, limit)
    rest = bytearray(_padded(length) - _ALIGNMENT)
    if rest:
        receive_buffers(sock, [memoryview(rest)])
    return _decode((data + rest)[_LENGTH.size : _LENGTH.size + length])


def send_buffers(sock: socket.socket, buffers: Sequence[memoryview], *, more: bool = False) -> None:
    """Send every byte of the buffers, in order; `more` as for `send_message`."""
    flags = socket.MSG_MORE if more else 0
    for start in range(0, len(buffers), WINDOW):
        window = list(buffers[start : start + WINDOW])
        left = sum(map(len, window))
        while left:
            sent = sock.sendmsg(window, (), flags)
            left -= sent
            if left:
                _advance(window, sent)


def receive_buffers(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers, in order. Raises `PeerLost` at the end of the stream."""
    if buffers and len(buffers[0]) >= _LARGE:
        for buffer in buffers:
            _receive_one(sock, buffer)
        return
    for start in range(0, len(buffers), WINDOW):
        window = list(buffers[start : start + WINDOW])
        left = sum(map(len, window))
        while left:
            got = sock.recvmsg_into(window)[0]
            if not got:
                raise PeerLost(_CUT)
            left -= got
            if left:
                _advance(window, got)


def limit_waiting(sock: socket.socket, seconds: float) -> None:
    """Let no single system call wait longer. Cheaper than Python's timeouts, which poll before every call."""
    micros = max(1000, int(seconds * 1e6))
    value = struct.pack("ll", micros // 1_000_000, micros % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def wait_forever(sock: socket.socket) -> None:
    """Lift the limit of `limit_waiting`."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, _FOREVER)


def tune(sock: socket.socket) -> None:
    """Set what every connection of this transport has."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def prove_client(sock: socket.socket, secret: bytes, incarnation: str, worker_id: str) -> None:
    """The client's half of the handshake with the life `incarnation` of a server.

    Raises `PeerLost` when that life is over, `TransferRefused` when a side does not know the secret.
    """
    challenge = receive_message(sock, _HANDSHAKE_BYTES)
    if not isinstance(challenge, Challenge) or challenge.version != VERSION:
        raise PeerLost(f"expected a KV transfer endpoint of version {VERSION}, found {challenge!r:.200}")
    if challenge.incarnation != incarnation:
        raise PeerLost("the worker that offered the KV is gone: another one answers at its address")
    nonce = secrets.token_bytes(32)
    mac = _mac(secret, b"client", challenge.nonce, nonce, incarnation)
    send_message(sock, Proof(incarnation, worker_id, nonce, mac))
    welcome = receive_message(sock, _HANDSHAKE_BYTES)
    if isinstance(welcome, Reply):
        raise TransferRefused(welcome.refused)
    if not isinstance(welcome, Welcome) or not hmac.compare_digest(
        welcome.mac, _mac(secret, b"server", challenge.nonce, nonce, incarnation)
    ):
        raise TransferRefused("the KV peer does not know the deployment's secret: give all workers the same one")


def prove_server(sock: socket.socket, secret: bytes, incarnation: str) -> str:
    """The server's half; the worker id of the client. Raises `TransferRefused` for strangers."""
    nonce = secrets.token_bytes(32)
    send_message(sock, Challenge(VERSION, incarnation, nonce))
    proof = receive_message(sock, _HANDSHAKE_BYTES)
    if not isinstance(proof, Proof):
        raise TransferRefused(f"expected a proof of the deployment's secret, found {proof!r:.100}")
    if not hmac.compare_digest(proof.mac, _mac(secret, b"client", nonce, proof.nonce, incarnation)):
        refusal = "this KV peer does not know the deployment's secret: give all workers the same one"
        send_message(sock, Reply(refused=refusal))
        raise TransferRefused(refusal)
    send_message(sock, Welcome(_mac(secret, b"server", nonce, proof.nonce, incarnation)))
    return proof.worker_id


def _length(data: bytes | bytearray, limit: int) -> int:
    """The announced length of a message."""
    length: int = _LENGTH.unpack_from(data)[0]
    if length > limit:
        raise PeerLost(f"the peer announced a message of {length} bytes; the limit is {limit}: it is no KV peer")
    return length


def _padded(length: int) -> int:
    """Bytes on the wire of a message of that length."""
    return -(-(_LENGTH.size + length) // _ALIGNMENT) * _ALIGNMENT


def _decode(body: bytes | bytearray) -> Message:
    try:
        message: Message = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise PeerLost(f"the peer sent what is no KV transfer message: {error}") from error
    return message


def _receive_one(sock: socket.socket, buffer: memoryview) -> None:
    left = len(buffer)
    while left:
        got = sock.recv_into(buffer)
        if not got:
            raise PeerLost(_CUT)
        left -= got
        if left:
            buffer = buffer[got:]


def _mac(secret: bytes, side: bytes, server_nonce: bytes, client_nonce: bytes, incarnation: str) -> bytes:
    parts = (b"dynamo kv transfer", side, server_nonce, client_nonce, incarnation.encode())
    return hmac.digest(secret, b"".join(_LENGTH.pack(len(part)) + part for part in parts), hashlib.sha256)


def _advance(window: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of the buffers."""
    done = 0
    while count >= len(window[done]):
        count -= len(window[done])
        done += 1
    del window[:done]
    if count:
        window[0] = window[0][count:]
