"""KV fingerprints: what must be equal before one worker may use KV that another computed.

A fingerprint is a flat `dict[str, str]` (`EngineInfo.kv_fingerprint`), so that it can travel in any message and a
mismatch can be named field by field. Payloads in an engine's own form need every field equal; canonical block
descriptors leave free what the core can convert: block size, order of dimensions, tensor parallelism and the engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from core.kv.layout import KvLayout
from core.messages.errors import ConfigError, EngineError

CANONICAL_FIELDS = ("model", "dtype", "layers", "kv_heads", "head_size", "parts", "rope")
"""Fields that must be equal even when the core converts: they decide what the numbers mean."""


class Mismatch(msgspec.Struct, frozen=True):
    """One field in which two fingerprints differ; None where a side does not state it."""

    field: str
    ours: str | None
    theirs: str | None


class FingerprintMismatch(ConfigError, EngineError):
    """Two workers whose KV is not interchangeable. Raised at start (configuration) and at import (request)."""

    def __init__(self, message: str, mismatches: list[Mismatch]) -> None:
        super().__init__(message)
        self.mismatches = mismatches


def build_fingerprint(
    layout: KvLayout, *, model: str, rope: str, engine: str, engine_version: str, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The fingerprint of a worker's KV.

    `model` identifies the weights (`identify_model`), `rope` how positions are encoded (`rope_text`); `extra` holds
    what else the engine's own payloads depend on. Raises `ValueError` when `extra` redefines a field.
    """
    fields = {
        "model": model,
        "dtype": layout.dtype,
        "layers": str(layout.layers),
        "kv_heads": str(layout.kv_heads),
        "head_size": str(layout.head_size),
        "parts": str(layout.parts),
        "rope": rope,
        "block_size": str(layout.block_size),
        "dims": layout.dims,
        "tp_size": str(layout.tp_size),
        "engine": engine,
        "engine_version": engine_version,
    }
    for key, value in (extra or {}).items():
        if key in fields:
            raise ValueError(f"the KV fingerprint has a field {key!r} already; name the engine's own field otherwise")
        fields[key] = value
    return fields


def compare(ours: Mapping[str, str], theirs: Mapping[str, str], *, canonical: bool) -> list[Mismatch]:
    """Fields in which the two differ, of those that matter for the kind of payload. Empty: KV may be exchanged.

    A field that matters and that a side does not state counts as different: nothing is taken on trust.
    """
    fields = CANONICAL_FIELDS if canonical else sorted({*CANONICAL_FIELDS, *ours, *theirs})
    return [
        Mismatch(field, ours.get(field), theirs.get(field))
        for field in fields
        if ours.get(field) is None or ours.get(field) != theirs.get(field)
    ]


def require_match(
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    *,
    canonical: bool,
    our_name: str = "this worker",
    their_name: str = "the other worker",
) -> None:
    """Raise `FingerprintMismatch`, naming every differing field and both values, unless KV may be exchanged."""
    mismatches = compare(ours, theirs, canonical=canonical)
    if not mismatches:
        return
    listed = "; ".join(
        f"{m.field} is {_shown(m.ours)} on {our_name} and {_shown(m.theirs)} on {their_name}" for m in mismatches
    )
    if canonical:
        advice = "Serve the same checkpoint with the same KV dtype on both"
    else:
        advice = (
            "Configure both alike, or use engines that exchange canonical KV, for which block size, order of "
            "dimensions, tensor parallelism and engine may differ"
        )
    raise FingerprintMismatch(f"KV cannot move between {our_name} and {their_name}: {listed}. {advice}.", mismatches)


def rope_text(config: Mapping[str, Any]) -> str:
    """How a model encodes positions, as one canonical text, from its `config.json` as a dictionary."""
    nested = config.get("rope_parameters")
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim", "rope_interleave")
    found: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
    if isinstance(nested, Mapping):
        found.update({key: value for key, value in nested.items() if value is not None})
    return json.dumps(found, sort_keys=True, separators=(",", ":"), default=str)


def identify_model(folder: Path, *, sample_bytes: int = 1 << 16) -> str:
    """Name a checkpoint by its content, so that the same weights match from different paths and hosts.

    Hashes `config.json` and, of every weight file, its name, size, and its first, middle and last `sample_bytes` bytes.
    Two checkpoints that differ only between the samples are not told apart. Raises `FileNotFoundError` when the folder
    has no `config.json`.
    """
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    weights = sorted(path for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pt") for path in folder.glob(pattern))
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2), max(0, size - sample_bytes)}):
                file.seek(start)
                digest.update(file.read(sample_bytes))
    return digest.hexdigest()


def _shown(value: str | None) -> str:
    return "not stated" if value is None else repr(value)
