"""What a worker publishes of itself with its endpoints."""

from __future__ import annotations

import msgspec

from core.messages import Capabilities, EngineInfo


class WorkerCard(msgspec.Struct, frozen=True, kw_only=True):
    """A started worker: its engine, and what a processor needs in order to speak for its model."""

    info: EngineInfo
    capabilities: Capabilities
    served_name: str
    """Name under which clients ask for the model."""
    tokenizer: str
    """Folder of tokenizer and chat template."""
    lora: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """For `ServiceContext.metadata`."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, metadata: bytes) -> WorkerCard:
        """From `Instance.metadata`. Raises `msgspec.ValidationError` for anything else."""
        return msgspec.msgpack.decode(metadata, type=cls)
