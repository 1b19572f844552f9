"""What a request can be sent to."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """One data-parallel rank of one worker: the unit that has a prefix cache and a load of its own."""

    worker: str
    """As `EngineConfig.worker_id`: unique in the deployment."""
    rank: int = 0

    def __str__(self) -> str:
        return self.worker if self.rank == 0 else f"{self.worker}/{self.rank}"
