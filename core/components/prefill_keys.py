"""Configuration keys of disaggregated prefill, on the Worker and the PrefillWorker alike. Times are seconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from core.components import keys
from core.graph.config import Needs, Secret
from core.messages import ConfigError, EngineConfig
from core.prefill.settings import DisaggSettings

_SANE = DisaggSettings()

Switch = Annotated[bool | None, Needs("PrefillWorker", unless=(False, None))]
Wait = Annotated[float, Meta(gt=0), Needs("PrefillWorker")]
Count = Annotated[int, Meta(ge=1), Needs("PrefillWorker")]


class PrefillKeys(EngineConfig, frozen=True, kw_only=True):
    """Everything that can be said of prefilling elsewhere."""

    enable_disaggregated_prefill: Switch = None
    """Let PrefillWorkers compute prompts; where a PrefillWorker is linked, true unless it is set."""
    remote_prefill: Switch = None
    """The same as enable-disaggregated-prefill."""
    conditional_disagg: keys.RemotePrefill = False
    """Send only prompts to a PrefillWorker that are long enough, and only while its queue is short enough."""
    max_local_prefill_length: keys.PrefillLimit = _SANE.max_local_prefill_length
    """With conditional-disagg: prompts with at most this many uncached tokens are prefilled by the Worker."""
    max_prefill_queue_size: keys.PrefillLimit = _SANE.max_prefill_queue_size
    """With conditional-disagg: nothing is sent to a queue of this length."""
    prefill_fallback: Annotated[Literal["local", "error"], Needs("PrefillWorker")] = "local"
    """What becomes of a request whose prefill cannot be had elsewhere: the Worker prefills it, or it gets one error."""
    poisoned_prefill: Annotated[Literal["error", "local"], Needs("PrefillWorker")] = "error"
    """The same for a prompt on which several PrefillWorkers failed, and on which the Worker may fail as well."""

    reserve_timeout: Wait = _SANE.reserve_timeout
    """For room on the Worker."""
    prefill_queue_timeout: Wait = _SANE.prefill_queue_timeout
    """From the queue to a PrefillWorker."""
    prefill_timeout: Wait = _SANE.prefill_timeout
    """For the prefill."""
    kv_transfer_timeout: Wait = _SANE.kv_transfer_timeout
    """For fetching the KV."""
    answer_timeout: Wait = _SANE.answer_timeout
    """For a worker to answer a question of the other."""
    stop_timeout: Wait = _SANE.stop_timeout
    """For an engine to end what it was told to end."""
    kv_lease: Wait = _SANE.kv_lease
    """For which a PrefillWorker keeps KV that nobody has fetched yet."""
    kv_secret: Annotated[str | None, Secret(), Needs("PrefillWorker", unless=(None,))] = None
    """Signs KV tickets, the same on every worker; needed only where workers do not share a process."""

    kv_transfer: Annotated[Literal["auto", "memory", "nixl", "tcp"], Needs("PrefillWorker", unless=("auto",))] = "auto"
    """What moves KV between workers; auto is what is fastest between the two."""
    kv_checksum: Annotated[bool, Needs("PrefillWorker", unless=(False,))] = False
    """Send checksums with KV, and refuse blocks that arrive with other content."""
    kv_host: Annotated[str, Needs("PrefillWorker")] = "127.0.0.1"
    """Address on which KV is handed out to workers of other processes."""
    kv_advertise: Annotated[str, Needs("PrefillWorker")] = ""
    """Address that those workers are told, where it is not kv-host (0.0.0.0, a container)."""

    prefill_queue: Annotated[Literal["local", "nats"], Needs("PrefillWorker", unless=("local",))] = "local"
    """Where tasks wait: in this process, or on the JetStream server at NATS_SERVER (by default localhost)."""
    prefill_concurrency: Count = _SANE.prefill_concurrency
    """Prompts that a PrefillWorker has under way at once, those that wait to be fetched not counted."""
    prefill_queue_capacity: Count = _SANE.prefill_queue_capacity
    """Tasks that the queue takes; what is more is prefilled by the Worker."""
    prefill_attempts: Count = _SANE.prefill_attempts
    """PrefillWorkers that may fail on a prompt before it is given up."""
    prefill_ack_wait: Wait = _SANE.prefill_ack_wait
    """After which a PrefillWorker that shows no sign of life is dead, and its tasks go to another."""
    prefill_window: Count = _SANE.prefill_window
    """Waiting tasks among which a PrefillWorker looks for one whose beginning it holds."""
    prefill_max_overtakes: Annotated[int, Meta(ge=0), Needs("PrefillWorker")] = _SANE.prefill_max_overtakes
    """How often a waiting task lets a later one pass for that."""

    def disagg(self) -> DisaggSettings:
        """These keys as `core.prefill` reads them. Raises `ConfigError`, beginning with the key at fault."""
        switches = self.enable_disaggregated_prefill, self.remote_prefill
        if set(switches) == {True, False}:
            raise ConfigError(
                "remote-prefill is the same as enable-disaggregated-prefill, and one is true and the other false; "
                "keep one of them."
            )
        values: dict[str, Any] = {name: getattr(self, name) for name in DisaggSettings.__struct_fields__}
        on = False not in switches
        return DisaggSettings(**{**values, "enable_disaggregated_prefill": on, "remote_prefill": on})


def shared_keys() -> tuple[str, ...]:
    """Keys, with dashes, that must be the same on both sides because they describe what lies between them."""
    names = [
        "kv_secret",
        "prefill_queue",
        "prefill_queue_capacity",
        "prefill_attempts",
        "prefill_ack_wait",
        "prefill_window",
        "prefill_max_overtakes",
    ]
    assert set(names) <= set(msgspec.structs.asdict(PrefillKeys(model="")))
    return tuple(name.replace("_", "-") for name in names)
