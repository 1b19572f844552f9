"""Section names that choose an engine: `VllmWorker` is `Worker` on vllm."""

from __future__ import annotations

from collections.abc import Iterable

from core.graph.config import Alias

REFERENCE_ENGINES = ("vllm", "sglang", "trtllm", "torch")
"""Engines whose section names are understood whether their plug-ins are installed or not."""


def engine_aliases(engines: Iterable[str]) -> dict[str, Alias]:
    """An alias for every engine: `my-engine` gives `MyEngineWorker`."""
    return {
        "".join(part.capitalize() for part in name.split("-")) + "Worker": Alias("Worker", {"engine": name})
        for name in (*REFERENCE_ENGINES, *engines)
    }
