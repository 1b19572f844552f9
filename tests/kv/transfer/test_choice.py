"""Which transport is chosen, with the reason, and what is refused at start."""

from __future__ import annotations

import socket

import msgspec
import pytest
from kv_peer import LAYOUT
from transports import needs_nixl

from core.kv.transfer import MemoryKind, TransferRefused, TransferSettings, Transport
from core.kv.transfer.choice import choose
from core.kv.transfer.host import Whereabouts, can_attach, whereabouts
from core.kv.transfer.offer import NixlAddress, TcpAddress, TransferOffer, decode_offer, encode_offer
from core.kv.transfer.pool import KvRegion
from core.messages import ConfigError


def offer(worker_id, *, process="a", boot="b", nixl=True, rdma=False, memory=MemoryKind.DRAM, through_host=True):
    return TransferOffer(
        schema=1,
        worker_id=worker_id,
        incarnation=worker_id * 8,
        layout=LAYOUT,
        regions=tuple(KvRegion(1 << 20 << n, LAYOUT.region_bytes) for n in range(LAYOUT.region_count)),
        num_blocks=4,
        memory=memory,
        device=0,
        through_host=through_host,
        where=Whereabouts(process, boot, 1, 0, b"", rdma),
        board=0,
        tcp=TcpAddress("127.0.0.1", 1),
        nixl=NixlAddress(worker_id, b"m") if nixl else None,
    )


VRAM = {"memory": MemoryKind.VRAM}


@pytest.mark.parametrize(
    ("theirs", "attach", "transport", "reason"),
    [
        ({"process": "a"}, True, "memory", "one process"),
        ({}, True, "nixl", "CMA"),
        ({}, False, "tcp", "ptrace or namespaces forbid it"),
        ({"boot": "c"}, False, "tcp", "different hosts"),
        ({"boot": "c", "rdma": True}, False, "nixl", "RDMA"),
        ({"nixl": False}, True, "tcp", "other has no NIXL"),
        ({**VRAM, "boot": "c"}, False, "nixl", "device memory"),
        ({**VRAM, "nixl": False}, False, "tcp", "other has no NIXL"),
        ({**VRAM, "process": "a", "through_host": False}, False, "nixl", "device memory"),
    ],
)
def test_the_fastest_that_both_sides_have(theirs, attach, transport, reason):
    mine = offer("mine", rdma=True)
    choice = choose(mine, offer("other", **{"process": "z"} | theirs), Transport.AUTO, attach=attach)
    assert choice.transport == transport
    assert reason in choice.reason


def test_what_cannot_be_is_refused_with_what_each_side_has():
    sealed = offer("other", process="z", nixl=False, through_host=False, memory=MemoryKind.VRAM)
    with pytest.raises(
        TransferRefused, match=r"memory: they are different processes; nixl: other has no NIXL; tcp: .*copier"
    ):
        choose(offer("mine"), sealed, Transport.AUTO, attach=True)
    with pytest.raises(TransferRefused, match="kv-transfer is memory, which cannot move KV between mine and other"):
        choose(offer("mine"), offer("other", process="z"), Transport.MEMORY, attach=True)
    assert choose(offer("mine"), offer("other"), Transport.TCP, attach=True).reason == "configured (kv-transfer: tcp)"


def test_memory_of_another_process_is_found_reachable_only_by_reading_it(peers):
    """This process reaches a child's memory here, not a forged mark, another boot, or a process that is gone."""
    holder = peers(settings=TransferSettings(transport=Transport.TCP))
    where = decode_offer(holder.ask("offer"))[0].where
    assert can_attach(where)
    assert not can_attach(msgspec.structs.replace(where, mark=bytes(16)))
    assert not can_attach(msgspec.structs.replace(where, boot="another"))
    holder.kill()
    assert not can_attach(where)
    assert where.process != whereabouts().process


@needs_nixl
async def test_by_itself_a_worker_chooses_as_documented(peers, endpoints):
    """Same process: memory. Same host: NIXL over CMA. A peer without NIXL: sockets."""
    mine = await endpoints()
    beside = await endpoints(worker_id="beside")
    assert mine.route(beside.offer).transport is Transport.MEMORY
    assert mine.route(peers(worker_id="x").ask("offer")).transport is Transport.NIXL
    plain = peers(worker_id="y", settings=TransferSettings(transport=Transport.TCP)).ask("offer")
    assert mine.route(plain).transport is Transport.TCP
    assert "y has no NIXL" in mine.route(plain).reason


async def test_what_is_not_an_offer_is_refused(endpoints):
    mine = await endpoints(TransferSettings(transport=Transport.TCP))
    with pytest.raises(TransferRefused, match="cannot be read"):
        mine.route(b"nonsense")
    described = decode_offer(mine.offer)[0]
    with pytest.raises(TransferRefused, match="has version 99, this worker understands 1"):
        mine.route(encode_offer(msgspec.structs.replace(described, schema=99)))
    with pytest.raises(TransferRefused, match="has 4 memory regions, but 1 were given"):
        mine.route(encode_offer(msgspec.structs.replace(described, regions=described.regions[:1])))


async def test_a_bad_configuration_is_refused_at_start(endpoints):
    with pytest.raises(ConfigError, match="secret has 5 bytes; at least 16"):
        await endpoints(TransferSettings(transport=Transport.TCP), secret=b"short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await endpoints(TransferSettings(transport=Transport.TCP, port=port))


async def test_nixl_that_is_configured_but_absent_is_refused_at_start(endpoints, monkeypatch):
    monkeypatch.setattr("core.kv.transfer.nixl_load._PACKAGES", ())
    with pytest.raises(ConfigError, match=r"kv-transfer is nixl, but NIXL is not installed: pip install"):
        await endpoints(TransferSettings(transport=Transport.NIXL))
    auto = await endpoints()
    assert auto.described.nixl is None
