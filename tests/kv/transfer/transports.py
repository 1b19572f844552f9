"""Which ways of moving KV can be tried here."""

from __future__ import annotations

import importlib.util

import pytest

from core.kv.transfer import TransferSettings, Transport

HAVE_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13", "nixl_rocm"))
needs_nixl = pytest.mark.skipif(not HAVE_NIXL, reason="NIXL is not installed: pip install 'dynamo-serve[nixl]'")

TRANSPORTS = {
    "tcp": TransferSettings(transport=Transport.TCP, patience=0.2),
    "nixl": TransferSettings(transport=Transport.NIXL, patience=0.2),
    "nixl-tcp": TransferSettings(transport=Transport.NIXL, ucx="TLS=tcp", patience=0.2),
}
