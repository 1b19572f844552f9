"""The public door of KV transfer: one endpoint a pool, that exposes blocks to peers and moves blocks of peers.

endpoint = await KvEndpoint.open(pool, worker_id="prefill-0", secret=secret)
endpoint.offer                                    # bytes, for tickets and discovery
endpoint.grant(session, blocks, Access.READ, lease=30)
report = await endpoint.read(peer_offer, session, remote_blocks, local_blocks, deadline=deadline)
endpoint.revoke(session)
endpoint.free_when_idle(blocks, allocator.free)
await endpoint.close()
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.util
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from core.kv.lease import Deadline
from core.kv.transfer.choice import Choice, Transport, choose
from core.kv.transfer.convert import Converter, Span
from core.kv.transfer.errors import TransferRefused
from core.kv.transfer.grants import Access, Grants, Proof
from core.kv.transfer.host import can_attach, whereabouts
from core.kv.transfer.inflight import Free, InFlight
from core.kv.transfer.move import Move, Movers, Remote, in_process
from core.kv.transfer.nixl_agent import NixlAgent
from core.kv.transfer.offer import OFFER_SCHEMA, NixlAddress, TcpAddress, TransferOffer, decode_offer, encode_offer
from core.kv.transfer.plan import narrow_pattern
from core.kv.transfer.pool import KvPool, MemoryKind
from core.kv.transfer.scratch import Scratch
from core.kv.transfer.settings import TransferReport, TransferSettings
from core.kv.transfer.side import LocalSide, require_checksums
from core.kv.transfer.tcp_client import TcpClient
from core.kv.transfer.tcp_server import TcpServer
from core.messages.errors import ConfigError

SHORTEST_SECRET = 16
_PURPOSE = b"dynamo kv transfer v1"


class KvEndpoint:
    """The door to KV transfer of one pool: a worker's, or one tensor-parallel rank's. Use from one event loop."""

    def __init__(
        self, pool: KvPool, worker_id: str, secret: bytes, settings: TransferSettings, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Use `open`. Blocks for as long as NIXL takes to start; servers and threads run when it returns."""
        key = _derive(secret)
        self.pool = pool
        self.worker_id = worker_id
        self.settings = settings
        self.incarnation = secrets.token_hex(16)
        self.grants = Grants()
        self.inflight = InFlight(loop.call_soon_threadsafe)
        self._side = LocalSide(pool, self.grants, self.inflight)
        self._routes: dict[str, Choice] = {}
        self._lives: dict[tuple[str, int], str] = {}
        self._closed = False
        self._nixl_note = ""
        self._nixl = self._start_nixl()
        try:
            self._server = TcpServer(self._side, key, self.incarnation, settings.host, settings.port)
        except OSError as error:
            if self._nixl is not None:
                self._nixl.close()
            raise ConfigError(
                f"the KV transfer endpoint of {worker_id} cannot listen on {settings.host}:{settings.port}: {error}. "
                "Give another address or port"
            ) from error
        self._client = TcpClient(key, worker_id)
        self._executor = ThreadPoolExecutor(settings.parallel, thread_name_prefix=f"kv-{worker_id}")
        self._movers = Movers(self._executor, settings.parallel, self._client, self._nixl)
        self._converter = Converter(self._movers, self._side, Scratch(self._nixl))
        self.described = self._describe()
        self.offer: bytes = encode_offer(self.described)
        """What peers need to reach the pool; the same bytes for the endpoint's whole life."""
        in_process[self.incarnation] = self._side

    @classmethod
    async def open(
        cls, pool: KvPool, *, worker_id: str, secret: bytes, settings: TransferSettings | None = None
    ) -> KvEndpoint:
        """Register a pool and start serving it.

        `secret` is the deployment's: at least 16 bytes. Raises `ConfigError` for one too short, an address that cannot
        be bound, and for a transport that is configured and cannot be had here.
        """
        settings = settings or TransferSettings()
        return await asyncio.to_thread(cls, pool, worker_id, secret, settings, asyncio.get_running_loop())

    async def __aenter__(self) -> KvEndpoint:
        """The endpoint is open already."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> bool:
        """Take the pool out of everybody's reach; whether its memory may be unmapped now. Idempotent.

        False when NIXL still owns a transfer to a peer that hangs: the pool (and its owner) is then kept until it ends.
        """
        self._closed = True
        in_process.pop(self.incarnation, None)
        for session in self.grants.sessions:
            self.grants.revoke(session)
        self._client.close()
        self._movers.stop()
        return await asyncio.to_thread(self._close)

    def grant(self, session: str, blocks: Sequence[int], access: Access, lease: float) -> None:
        """Let peers that name the session read or write blocks for `lease` seconds from now.

        Raises `ValueError` for blocks outside the pool and for a lease that is not positive.
        """
        self.pool.check_blocks(blocks)
        self.grants.grant(session, blocks, access, lease)

    def revoke(self, session: str) -> bool:
        """End a session's grant; whether there was one. Free its blocks with `free_when_idle`."""
        return self.grants.revoke(session)

    def free_when_idle(self, blocks: Iterable[int], free: Free) -> None:
        """Give blocks back to their allocator as soon as no transfer can touch them, most often at once."""
        self.inflight.free_when_idle(blocks, free)

    async def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Checksums of whole blocks, as `read` takes them. Computed in a thread."""
        return await asyncio.to_thread(self._side.checksums, blocks)

    async def read(
        self,
        offer: bytes,
        session: str,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        *,
        deadline: Deadline,
        tokens: int | None = None,
        remote_skip: int = 0,
        local_skip: int = 0,
        heads: range | None = None,
        layers: range | None = None,
        checksums: Sequence[int] = (),
        proof: Proof | None = None,
    ) -> TransferReport:
        """Fetch `tokens` tokens that follow the first `remote_skip` of the peer's blocks, behind `local_skip` of ours.

        Both lists are in token order; by default everything in the remote list is fetched. `heads` defaults to those
        that both ranks hold, `layers` to all. `checksums`, one for each remote block, are verified. `proof` spares a
        question to the holder where this process can see for itself that the session is held.

        Post: the tokens are in place and were held by the peer's session until after they were read. Blocks of one
        layout are copied whole: tokens behind the last one asked for, in its block, are overwritten too.
        Raises `TransferError` when any of that is not so, `ValueError` for arguments that contradict each other; the
        local blocks are then not to be used, and must be freed through `free_when_idle`.
        """
        started = time.perf_counter()
        remote, choice = self._reach(offer, deadline, proof)
        span = self._span(remote, session, remote_blocks, local_blocks, tokens, remote_skip, local_skip, heads, layers)
        if checksums and (len(checksums) != len(remote_blocks) or len(span.layers) != self.pool.layout.layers):
            raise ValueError("checksums must be one a remote block, and cover all layers")
        if self._is_plain(remote, span, heads):
            move, first = self._plain(remote, span, deadline)
            await self._movers.read(remote, move)
            if checksums:
                expected = checksums[first : first + len(move.local_blocks)]
                await self._movers.in_thread(
                    lambda _: require_checksums(self._side.checksums(move.local_blocks), expected), deadline
                )
            moved = _move_bytes(self.pool, move)
        else:
            moved = await self._converter.read(remote, span, deadline, checksums)
        return TransferReport(choice.transport, choice.reason, moved, time.perf_counter() - started)

    async def write(
        self,
        offer: bytes,
        session: str,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        *,
        deadline: Deadline,
        tokens: int | None = None,
        local_skip: int = 0,
        remote_skip: int = 0,
        heads: range | None = None,
        layers: range | None = None,
    ) -> TransferReport:
        """Send tokens into the peer's blocks; the mirror of `read`. By default everything in the local list is sent.

        Post: the bytes are in the peer's memory, and its session was alive until they were.
        Raises as `read`; the remote blocks then hold nothing of use.
        """
        started = time.perf_counter()
        remote, choice = self._reach(offer, deadline)
        if tokens is None:
            tokens = len(local_blocks) * self.pool.layout.block_size - local_skip
        span = self._span(remote, session, remote_blocks, local_blocks, tokens, remote_skip, local_skip, heads, layers)
        if self._is_plain(remote, span, heads):
            move, _ = self._plain(remote, span, deadline)
            await self._movers.write(remote, move)
            moved = _move_bytes(self.pool, move)
        else:
            moved = await self._converter.write(remote, span, deadline)
        return TransferReport(choice.transport, choice.reason, moved, time.perf_counter() - started)

    def route(self, offer: bytes) -> Choice:
        """The transport to a peer, and why. Raises `TransferRefused` when there is none."""
        described, _ = decode_offer(offer)
        choice = self._routes.get(described.incarnation)
        if choice is None:
            choice = choose(
                self.described,
                described,
                self.settings.transport,
                attach=can_attach(described.where),
                nixl_note=self._nixl_note,
            )
            self._routes[described.incarnation] = choice
            # One life of a worker (rank) at a time: what was known of an earlier one is worthless.
            place = (described.worker_id, described.layout.tp_rank)
            earlier = self._lives.get(place)
            if earlier is not None:
                self._forget_life(earlier)
            self._lives[place] = described.incarnation
        return choice

    def forget(self, worker_id: str) -> None:
        """Drop everything known of a worker that has left. Unknown ones are no error."""
        for place in [place for place in self._lives if place[0] == worker_id]:
            self._forget_life(self._lives.pop(place))

    @property
    def connections(self) -> int:
        """Peers connected to this endpoint over TCP."""
        return self._server.connections

    def drop_connections(self) -> None:
        """Cut every peer's TCP connection; they come back with their next request."""
        self._server.drop()

    @property
    def nixl_unsettled(self) -> int:
        """Transfers that NIXL still owns, those given up among them; 0 without NIXL."""
        return 0 if self._nixl is None else self._nixl.unsettled

    async def known_agents(self) -> list[str]:
        """NIXL agents of peers whose metadata is kept."""
        return [] if self._nixl is None else await asyncio.wrap_future(self._nixl.call(self._nixl.known))

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the books agree: claims, waiting frees, and, when closed, nothing exposed."""
        self.inflight.check_integrity()
        self.pool.check_integrity()
        if self._closed:
            assert not self.grants.sessions, f"sessions {self.grants.sessions} outlived the endpoint"

    def _reach(self, offer: bytes, deadline: Deadline, proof: Proof | None = None) -> tuple[Remote, Choice]:
        if self._closed:
            raise TransferRefused(f"the KV transfer endpoint of {self.worker_id} is closed")
        described, geometry = decode_offer(offer)
        choice = self.route(offer)
        return Remote(described, geometry, choice.transport, proof), choice

    def _span(
        self,
        remote: Remote,
        session: str,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        tokens: int | None,
        remote_skip: int,
        local_skip: int,
        heads: range | None,
        layers: range | None,
    ) -> Span:
        mine, theirs = self.pool.layout, remote.geometry.layout
        remote_blocks, local_blocks = list(remote_blocks), list(local_blocks)
        self.pool.check_blocks(local_blocks)
        remote.geometry.check_blocks(remote_blocks)
        if tokens is None:
            tokens = len(remote_blocks) * theirs.block_size - remote_skip
        for name, blocks, size, skip in (
            ("remote", remote_blocks, theirs.block_size, remote_skip),
            ("local", local_blocks, mine.block_size, local_skip),
        ):
            if skip < 0 or tokens < 1 or skip + tokens > len(blocks) * size:
                raise ValueError(
                    f"{tokens} tokens after {skip} do not fit the {name} list of {len(blocks)} blocks of {size} tokens"
                )
        if heads is None:
            heads = range(max(mine.heads.start, theirs.heads.start), min(mine.heads.stop, theirs.heads.stop))
        layers = range(mine.layers) if layers is None else layers
        return Span(session, remote_blocks, local_blocks, tokens, remote_skip, local_skip, heads, layers)

    def _is_plain(self, remote: Remote, span: Span, heads: range | None) -> bool:
        """Whether blocks can be copied as they are."""
        mine, theirs = self.pool.layout, remote.geometry.layout
        size = mine.block_size
        if (
            mine.same_block(theirs)
            and heads in (None, mine.heads)
            and not (span.remote_skip % size or span.local_skip % size)
        ):
            return True
        try:
            mine.require_convertible(theirs)
        except ValueError as error:
            raise TransferRefused(
                f"KV of {remote.offer.worker_id} cannot be used by {self.worker_id}: {error}"
            ) from error
        if importlib.util.find_spec("numpy") is None:
            raise ConfigError("KV of another layout can be converted only with numpy: pip install numpy")
        return False

    def _plain(self, remote: Remote, span: Span, deadline: Deadline) -> tuple[Move, int]:
        """The move of whole blocks, and the index of the first remote one."""
        layout = self.pool.layout
        count = -(-span.tokens // layout.block_size)
        first, local = span.remote_skip // layout.block_size, span.local_skip // layout.block_size
        pattern = None
        if len(span.layers) != layout.layers:
            pattern = narrow_pattern(layout, heads=None, layers=span.layers)
        move = Move(
            span.session,
            span.remote_blocks[first : first + count],
            span.local_blocks[local : local + count],
            self._side,
            deadline,
            pattern,
        )
        return move, first

    def _start_nixl(self) -> NixlAgent | None:
        wanted = self.settings.transport
        if wanted not in (Transport.AUTO, Transport.NIXL):
            return None
        try:
            name = f"{self.worker_id}-{self.incarnation}"
            return NixlAgent(name, self.pool, ucx=self.settings.ucx)
        except ImportError as error:
            if wanted is Transport.NIXL:
                raise ConfigError(f"kv-transfer is nixl, but {error}") from error
            self._nixl_note = f"{self.worker_id} has no NIXL ({error})"
        return None

    def _describe(self) -> TransferOffer:
        pool, settings = self.pool, self.settings
        return TransferOffer(
            schema=OFFER_SCHEMA,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            layout=pool.layout,
            regions=pool.regions,
            num_blocks=pool.num_blocks,
            memory=pool.memory,
            device=pool.device,
            through_host=pool.memory is MemoryKind.DRAM or pool.copier is not None,
            where=whereabouts(),
            board=self.grants.board,
            tcp=TcpAddress(settings.advertise or settings.host, self._server.port),
            nixl=None if self._nixl is None else NixlAddress(self._nixl.name, self._nixl.metadata),
        )

    def _forget_life(self, incarnation: str) -> None:
        self._routes.pop(incarnation, None)
        self._client.forget(incarnation)
        if self._nixl is not None:
            self._nixl.forget(incarnation)

    def _close(self) -> bool:
        down = True
        if self._nixl is not None:
            down = self._nixl.close(self.settings.patience)
        self._server.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        return down


def _derive(secret: bytes) -> bytes:
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"the deployment's secret has {len(secret)} bytes; at least {SHORTEST_SECRET} are needed, the same on "
            "every worker"
        )
    return hmac.digest(secret, _PURPOSE, hashlib.sha256)


def _move_bytes(pool: KvPool, move: Move) -> int:
    piece = pool.layout.block_bytes if move.pattern is None else sum(length for _, _, length in move.pattern)
    return piece * len(move.local_blocks)
