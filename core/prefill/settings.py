"""The configuration of disaggregated prefill. Keys are written with dashes or underscores; times are seconds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from core.kv.lease import DRIFT, LeaseTerms
from core.messages.errors import ConfigError
from core.prefill.queue import QueueSettings


class DisaggSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a Worker and a PrefillWorker are told. Every wait has its deadline here."""

    enable_disaggregated_prefill: bool = False
    """Let PrefillWorkers compute prompts."""
    remote_prefill: bool = False
    """The same."""
    conditional_disagg: bool = False
    """Only prompts that are long enough, and only while the queue is short enough; otherwise every prompt."""
    max_local_prefill_length: int = 1000
    """With conditional-disagg: at most so many uncached tokens are prefilled by the Worker itself."""
    max_prefill_queue_size: int = 3
    """With conditional-disagg: nothing is sent to a queue of this length."""
    prefill_fallback: Literal["local", "error"] = "local"
    """What becomes of a request whose prefill cannot be had elsewhere: prefilled by the Worker, or one error."""
    poisoned_prefill: Literal["error", "local"] = "error"
    """The same for a prompt on which several PrefillWorkers failed with an error. A Worker may fail on it as well."""

    reserve_timeout: float = 10.0
    """For room on the Worker."""
    prefill_queue_timeout: float = 10.0
    """From the queue to a PrefillWorker."""
    prefill_timeout: float = 60.0
    """For the prefill."""
    kv_transfer_timeout: float = 20.0
    """For the claim and the import."""
    answer_timeout: float = 5.0
    """For a worker to answer a question of the other."""
    stop_timeout: float = 5.0
    """For an engine to end what it was told to end."""
    kv_lease: float = 30.0
    """For which a PrefillWorker keeps KV that nobody has fetched yet."""
    kv_secret: str | None = None
    """Signs KV tickets; the same on every worker. Not needed where all of them share a process."""

    prefill_concurrency: int = 8
    """Prompts that a PrefillWorker has under way at once, those that wait to be fetched not counted."""
    prefill_queue_capacity: int = 1024
    """Tasks that the queue takes; more are refused."""
    prefill_attempts: int = 3
    """PrefillWorkers that may fail on a prompt before it is given up."""
    prefill_ack_wait: float = 5.0
    """After which a PrefillWorker that shows no sign of life is dead."""
    prefill_window: int = 8
    """Waiting tasks that a PrefillWorker chooses from."""
    prefill_max_overtakes: int = 4
    """How often a waiting task lets a later one pass."""

    def __post_init__(self) -> None:
        for name in _TIMES:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_key(name)} is {getattr(self, name):g}; it must be above 0 seconds.")
        for name, least in (
            ("max_local_prefill_length", 0),
            ("max_prefill_queue_size", 0),
            ("prefill_concurrency", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{_key(name)} is {getattr(self, name)}; it must be at least {least}.")
        _ = self.lease, self.queue

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DisaggSettings:
        """From configuration. Raises `ConfigError` naming the key, with the nearest known one for a misspelt key."""
        return _convert(cls, {}, values)

    def changed(self, values: Mapping[str, Any]) -> DisaggSettings:
        """These settings with some values replaced. Raises as `of`."""
        return _convert(type(self), msgspec.structs.asdict(self), values)

    @property
    def enabled(self) -> bool:
        """Whether any prompt may be prefilled elsewhere."""
        return self.enable_disaggregated_prefill or self.remote_prefill

    @property
    def lease(self) -> LeaseTerms:
        """Under which a PrefillWorker holds KV."""
        return LeaseTerms.of(self.kv_lease)

    @property
    def room_lease(self) -> LeaseTerms:
        """Under which a Worker holds room: longer than all that can happen to it, one deadline after the other, so that
        it ends a room only if the Worker itself has lost track of it, and no writer ever writes later.
        """
        waits = self.prefill_queue_timeout + self.prefill_timeout + self.kv_transfer_timeout + self.stop_timeout
        return LeaseTerms.of((self.prefill_attempts + 1) * waits / (0.9 - DRIFT))

    @property
    def queue(self) -> QueueSettings:
        """For the prefill queue."""
        return QueueSettings(
            capacity=self.prefill_queue_capacity,
            ack_wait=self.prefill_ack_wait,
            max_attempts=self.prefill_attempts,
            window=self.prefill_window,
            max_overtakes=self.prefill_max_overtakes,
        )


_TIMES = (
    "reserve_timeout",
    "prefill_queue_timeout",
    "prefill_timeout",
    "kv_transfer_timeout",
    "answer_timeout",
    "stop_timeout",
)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _convert(kind: type[DisaggSettings], base: dict[str, Any], values: Mapping[str, Any]) -> DisaggSettings:
    known = kind.__struct_fields__
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{_key(near[0])}'?" if near else f"known are {', '.join(map(_key, known))}."
            raise ConfigError(f"'{key}' is no setting of disaggregated prefill; {hint}")
        base[name] = value
    try:
        return msgspec.convert(base, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"disaggregated prefill: {str(error).replace('_', '-')}") from error
