"""What an engine says of itself: its description before it is started, its facts after."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import msgspec

from core.messages.errors import ConfigError
from core.messages.request import ConstraintKind, SamplingParams


class Role(StrEnum):
    """What a worker does in its graph."""

    AGGREGATED = "aggregated"
    """Prefills and decodes."""
    PREFILL = "prefill"
    """Computes prompts' KV for other workers."""
    DECODE = "decode"
    """Decodes from imported KV, and prefills by itself when that is cheaper."""


class Rendezvous(StrEnum):
    """How KV gets from a prefill worker to a decode worker (see docs/write-an-engine.md)."""

    PULL = "pull"
    """Prefill finishes; its ticket goes to the decode worker, which reads the KV."""
    PUSH = "push"
    """Decode reserves blocks first; prefill writes into them and notifies."""
    HANDSHAKE = "handshake"
    """Both sides start together and meet at an address that the prefill side names."""


class Continuation(StrEnum):
    """What can go on unnoticed when a sequence is resumed with `EngineRequest.prior_tokens`.

    Greedy decoding and `min_tokens` go on exactly on every engine; these need state that some engines cannot restore.
    """

    SEED = "seed"
    """The random numbers of a seeded request go on where they stopped."""
    PENALTIES = "penalties"
    """Presence and frequency penalties count the prior tokens as output."""
    CONSTRAINT = "constraint"
    """The constraint has read the prior tokens."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter can do. What is not declared is refused in a sentence, never ignored.

    Configurations are refused at start, requests by the core before the adapter sees them (`core/engine/admission.py`).
    A role or rendezvous that is declared requires its hooks: see `core/engine/validate.py`. The conformance kit holds
    an adapter to everything that it declares.
    """

    roles: frozenset[Role] = frozenset({Role.AGGREGATED})
    """What a worker with this engine can be."""
    rendezvous: frozenset[Rendezvous] = frozenset()
    """How KV gets across; none when the engine cannot be disaggregated."""
    canonical_kv: bool = False
    """Exports and imports KV as the core's canonical blocks, so that the other side may be a different engine."""
    kv_events: bool = False
    """Tells what its prefix cache holds (`kv_events`), which cache-aware routing works from."""
    prefix_caching: bool = False
    """Reuses the KV of common prefixes, says how much in `Delta.cached_tokens`, and keeps cache salts apart."""
    constraints: frozenset[ConstraintKind] = frozenset()
    """Kinds of structured output."""
    sampling: frozenset[str] = frozenset(SamplingParams.__struct_fields__)
    """Fields of `SamplingParams` that change the outcome as their docs say. A request that sets another is refused."""
    continues: frozenset[Continuation] = frozenset(Continuation)
    """What goes on exactly after `EngineRequest.prior_tokens`. A request that needs more is refused."""
    logprobs: bool = False
    """Of generated tokens, up to the 20 likeliest at each position."""
    prompt_logprobs: bool = False
    """The same of the prompt, whether its KV was cached or not."""
    lora: bool = False
    """Serves the adapters of `EngineConfig.lora_modules`, each request with its own."""
    priority: bool = False
    """Serves waiting requests in the order of their priority."""
    data_parallel: bool = False
    """Takes `data_parallel_size` above 1."""
    tensor_parallel: bool = False
    """Takes `tensor_parallel_size` above 1."""
    devices: tuple[str, ...] = ("cpu",)
    """Device kinds that the adapter has run on, the preferred one first: "cuda", "cpu" ..."""


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be said of an adapter without importing its engine."""

    name: str
    """What the user writes after `--engine`: lower-case letters, digits and dashes."""
    summary: str
    """One line."""
    package: str | None = None
    """Distribution whose presence makes the engine available ("torch", "vllm"); None when nothing is needed."""
    tested: str = ""
    """Versions of `package` that were seen working, as a PEP 440 specifier set: ">=0.31,<0.34"."""
    install: str = ""
    """Command that installs what is missing."""
    capabilities: Capabilities = Capabilities()
    model_required: bool = True
    """False for engines that need no model folder (echo, sim): a tokenizer is then enough."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's resolved configuration, in the framework's names; adapters translate them to their engine's.

    None means "the engine's default". Sizes are tokens, blocks or bytes as stated.
    """

    model: str
    """A local folder; hub ids have been resolved to one before the engine is started."""
    served_model_name: str = ""
    tokenizer: str | None = None
    """Folder of the tokenizer when it is not the model's."""
    dtype: str = "auto"
    """"auto" is what the checkpoint states; otherwise "float32", "bfloat16" or "float16"."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1"; None takes the best one there is."""
    block_size: int | None = None
    """Tokens in a KV block."""
    max_model_len: int | None = None
    """Longest sequence, prompt and output together, in tokens."""
    max_num_seqs: int | None = None
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step: the chunked-prefill budget."""
    num_kv_blocks: int | None = None
    """KV blocks to allocate, overriding every estimate."""
    kv_cache_memory: int | None = None
    """Bytes for the KV cache."""
    gpu_memory_utilization: float | None = None
    """Fraction of a GPU's memory for weights and KV together, in (0, 1]."""
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    trust_remote_code: bool = False
    seed: int = 0
    lora_modules: dict[str, str] = {}
    """LoRA name to adapter folder, loaded at start."""
    kv_transfer: Literal["auto", "memory", "nixl", "tcp"] = "auto"
    """What moves KV between workers; "auto" is what is fastest between the two."""
    kv_checksum: bool = False
    """KV travels with checksums, and blocks that arrive with other content are refused."""
    kv_lease: float = 30.0
    """Seconds for which KV is kept for the worker that is to fetch it."""
    kv_secret: str | None = None
    """Known to the deployment's workers alone: at least 16 bytes. Not needed where all of them share a process."""
    kv_host: str = "127.0.0.1"
    """Address on which KV is handed out to workers of other processes."""
    kv_advertise: str = ""
    """Address that those workers are told, where it is not `kv_host` (0.0.0.0, a container)."""
    engine_args: dict[str, Any] = {}
    """Goes to the engine unchanged. An adapter refuses keys that its engine does not know."""
    worker_id: str = "worker-0"
    """Unique in the deployment; names the worker in events, tickets and logs."""

    def tokenizer_file(self) -> Path:
        """The tokenizer.json of the model, or of `tokenizer`. Raises `ConfigError` when there is none."""
        folder = Path(self.tokenizer or self.model)
        file = folder / "tokenizer.json"
        if not file.is_file():
            found = "the folder has none" if folder.is_dir() else "there is no such folder"
            raise ConfigError(f"No tokenizer.json in '{folder}': {found}. Name a folder that has one.")
        return file

    def check_engine_args(self, known: Iterable[str]) -> None:
        """Raises `ConfigError` when `engine_args` has a key that is not in `known`, the engine's own arguments."""
        names = sorted(known)
        for key in self.engine_args:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else "remove it."
                raise ConfigError(f"The engine has no argument '{key}' (under engine-args); {hint}")


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a started engine really is.

    `engine` and `role` are filled in by the core, and `version` and `model` where the adapter leaves them empty.
    """

    vocab_size: int
    """Prompt ids lie below it. At least the tokenizer's; models often pad theirs."""
    max_model_len: int
    """Longest sequence, prompt and output together, in tokens. It fits the KV cache."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence, unless `ignore_eos`."""
    block_size: int = 0
    """Tokens in a KV block; 0 when the engine has no KV cache."""
    num_kv_blocks: int = 0
    """KV blocks that requests can use, of one data-parallel rank; 0 when the engine has no KV cache."""
    max_num_seqs: int = 0
    """Most sequences in one step; 0 when there is no limit."""
    max_num_batched_tokens: int = 0
    """Most tokens in one step; 0 when there is no limit."""
    device: str = "cpu"
    dtype: str = ""
    """Empty when the engine has no weights."""
    engine: str = ""
    version: str = ""
    """Of the engine's package; empty when it has none."""
    model: str = ""
    role: Role = Role.AGGREGATED
    data_parallel_size: int = 1
    kv_fingerprint: dict[str, str] = {}
    """What must be equal on both sides of a KV transfer, field by field: model, dtype, layers, heads, layout ..."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is on an engine now. Waiting requests are in `waiting`, every other unfinished one in `running`."""

    running: int
    waiting: int
    kv_blocks_used: int = 0
    """Blocks that running requests hold; blocks kept only for the prefix cache are free."""
    kv_blocks_total: int = 0
    """As `EngineInfo.num_kv_blocks`, of this rank."""
    tokens_in_flight: int = 0
    """Prompt tokens accepted and not computed yet."""
    data_parallel_rank: int = 0
