"""Fixtures: which transports there are, peers that always end, endpoints that are always closed and checked."""

from __future__ import annotations

import pytest
from kv_peer import LAYOUT, SECRET, Peer, fill
from transports import TRANSPORTS, needs_nixl

from core.kv.transfer import KvEndpoint, KvPool


@pytest.fixture(params=["tcp", pytest.param("nixl", marks=needs_nixl), pytest.param("nixl-tcp", marks=needs_nixl)])
def settings(request):
    """One transport after the other."""
    return TRANSPORTS[request.param]


@pytest.fixture
def peers():
    """Starts peer processes, and ends them whatever happens."""
    started = []

    def start(**arguments):
        started.append(Peer(**arguments))
        return started[-1]

    yield start
    for peer in started:
        peer.stop()


@pytest.fixture
async def endpoints():
    """Opens endpoints in this process; closes and checks them."""
    opened = []

    async def start(settings=None, *, layout=LAYOUT, num_blocks=64, worker_id="reader", secret=SECRET, seed=None):
        pool = KvPool.allocate(layout, num_blocks)
        if seed is not None:
            fill(pool, seed)
        opened.append(await KvEndpoint.open(pool, worker_id=worker_id, secret=secret, settings=settings))
        return opened[-1]

    yield start
    for endpoint in opened:
        await endpoint.close()
        endpoint.check_integrity()
