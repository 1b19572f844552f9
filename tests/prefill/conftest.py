"""Fixtures of the prefill tests."""

from __future__ import annotations

import pytest

from tests.prefill.nats_server import NatsServer


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory):
    server = NatsServer(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.kill()
