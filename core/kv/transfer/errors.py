"""What can go wrong while KV moves. Every one is retryable: the prompt can be prefilled again."""

from __future__ import annotations

from core.messages.errors import EngineError


class TransferError(EngineError):
    """The KV did not arrive, and nothing of what may have arrived is to be used."""

    retryable = True


class TransferLate(TransferError):
    """The deadline or the holder's lease ended first."""


class TransferRefused(TransferError):
    """The other side refused: unknown or ended session, blocks outside the grant, or a peer without the secret."""


class PeerLost(TransferError):
    """The other side died, was restarted, or cannot be reached."""


class ChecksumMismatch(TransferError):
    """Blocks arrived with other content than the holder exported."""
