"""Whether a Worker and a PrefillWorker can work together, found out before either takes a request."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from core.components.card import WorkerCard
from core.components.prefill_keys import PrefillKeys, shared_keys
from core.graph import Preflight
from core.graph.errors import SettingError
from core.kv.fingerprint import require_match
from core.messages import ConfigError
from core.runtime import Instance

DECODER, PREFILLER = "Worker", "PrefillWorker"


def check_pair(look: Preflight) -> None:
    """Raises `ConfigError` when the two, as configured, could not exchange KV. Both must be in the graph."""
    services = look.settings.services
    for name in (DECODER, PREFILLER):
        config = services[name].config
        assert isinstance(config, PrefillKeys)
        try:
            config.disagg()
        except ConfigError as error:
            raise SettingError(f"{name}: {error}") from error
    for key in shared_keys():
        ours, theirs = services[DECODER].setting(key), services[PREFILLER].setting(key)
        if ours.value != theirs.value:
            values = "different" if ours.secret else f"{ours.value!r} and {theirs.value!r}"
            raise SettingError(
                f"{theirs.origin}: {ours} and {theirs} must be the same, and are {values}; set it for the Worker alone."
            )
    queue = services[DECODER].setting("prefill-queue")
    if queue.value == "nats" and find_spec("nats") is None:
        raise SettingError(
            f"{queue.origin}: {queue} is nats, and the client for that is not installed: "
            "pip install 'dynamo-serve[distributed]'."
        )
    _check_engines(look)


def _check_engines(look: Preflight) -> None:
    names = [str(look.settings.services[name].setting("engine").value) for name in (DECODER, PREFILLER)]
    decoder, prefiller = (look.engines.get(name).description.capabilities for name in names)
    origin = look.settings.services[PREFILLER].setting("engine").origin
    if not decoder.rendezvous & prefiller.rendezvous:
        raise SettingError(
            f"{origin}: engine '{names[0]}' of the Worker moves KV by {_listed(decoder.rendezvous)}, and '{names[1]}' "
            f"of the PrefillWorker by {_listed(prefiller.rendezvous)}; choose engines that share a way "
            "('dynamo engines' lists them)."
        )
    if names[0] != names[1] and not (decoder.canonical_kv and prefiller.canonical_kv):
        without = [name for name, can in zip(names, (decoder, prefiller), strict=True) if not can.canonical_kv]
        raise SettingError(
            f"{origin}: the Worker's engine is '{names[0]}' and the PrefillWorker's '{names[1]}', and "
            f"{' and '.join(without)} cannot exchange KV with another engine; use one engine for both."
        )


def check_peers(card: WorkerCard, name: str, peers: Iterable[Instance]) -> None:
    """Raises `FingerprintMismatch`, naming fields and both values, when KV cannot move between this worker and a peer.

    `name`: this worker's id.
    """
    for peer in peers:
        other = WorkerCard.decode(peer.metadata)
        require_match(
            card.info.kv_fingerprint,
            other.info.kv_fingerprint,
            canonical=card.capabilities.canonical_kv and other.capabilities.canonical_kv,
            our_name=f"{name} ({card.info.engine})",
            their_name=f"{peer.id} ({other.info.engine})",
        )


def _listed(kinds: Iterable[str]) -> str:
    return " or ".join(sorted(kinds)) or "nothing"
