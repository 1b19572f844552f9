"""Keys of the Worker: those of the engine, and those of the modes it takes part in."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta

from core.components import keys
from core.components.prefill_keys import PrefillKeys
from core.messages import EngineConfig


class WorkerConfig(PrefillKeys, frozen=True, kw_only=True):
    """Keys of the Worker and the PrefillWorker. Sizes of None are the engine's defaults."""

    INTERNAL: ClassVar[frozenset[str]] = frozenset({"worker_id"})

    engine: str = "torch"
    """Engine that runs the model; 'dynamo engines' lists them."""
    model: keys.ModelName = ""
    """A folder, or a hub id such as Qwen/Qwen3-0.6B; empty is the demo model that ships with the project."""
    served_model_name: keys.ServedName = ""
    """Name under which clients ask for the model; by default the hub id or the folder's name."""
    block_size: keys.BlockSize = None
    """Tokens in a KV block."""
    max_model_len: keys.Positive | None = None
    """Longest sequence, prompt and output together, in tokens."""
    max_num_seqs: keys.Positive | None = None
    """Most sequences in one step."""
    max_num_batched_tokens: keys.Positive | None = None
    """Most tokens in one step: the chunked-prefill budget."""
    num_kv_blocks: keys.Positive | None = None
    """KV blocks to allocate, overriding every estimate."""
    kv_cache_memory: keys.Positive | None = None
    """Bytes for the KV cache."""
    gpu_memory_utilization: keys.Fraction | None = None
    """Fraction of a GPU's memory for weights and KV together."""
    tensor_parallel_size: keys.Positive = 1
    """GPUs over which each layer is split."""
    data_parallel_size: keys.Positive = 1
    """Copies of the model in one engine."""
    health_interval: Annotated[float, Meta(gt=0)] = 2.0
    """Seconds between two looks at the engine's health."""

    router: keys.RouterMode = "round-robin"
    """Understood for configurations of the reference; workers publish KV events when a Router asks for them."""
    kv_transfer_config: keys.KvTransfer = None
    """How KV is moved, in the engine's own terms."""

    def engine_config(self, **known: Any) -> EngineConfig:
        """The engine's part, with the fields that are only known at start."""
        fields = {name: getattr(self, name) for name in EngineConfig.__struct_fields__ if name != "worker_id"}
        return EngineConfig(**(fields | known))
