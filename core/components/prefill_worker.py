"""The prefill worker: computes prompts' KV for the Worker."""

from __future__ import annotations

from typing import ClassVar

from core.components.worker_config import WorkerConfig
from core.graph import Service, service


class PrefillWorkerConfig(WorkerConfig, frozen=True, kw_only=True):
    """The Worker's keys. What is not set here is as it was set for the Worker: both run the same model."""

    FOLLOWS: ClassVar[str] = "Worker"


@service(abstract=True)
class PrefillWorker(Service):
    """What a Worker can link to when another worker is to prefill for it."""

    Config = PrefillWorkerConfig
    config: PrefillWorkerConfig
