"""What the HTTP side has to know of a served model."""

from __future__ import annotations

import time
from typing import Self

import msgspec

from core.messages import Capabilities, EngineInfo


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model: its names, its tokenizer and what its engine can do."""

    names: tuple[str, ...]
    """Names that requests may use, at least one; answers carry the one that was asked for."""
    tokenizer: str
    """Folder with tokenizer.json, tokenizer_config.json and the chat template."""
    max_model_len: int
    """Longest sequence, prompt and output together, in tokens."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    capabilities: Capabilities = Capabilities()
    lora: tuple[str, ...] = ()
    """Names of loaded LoRA adapters; each can be asked for as a model."""
    engine: str = ""
    """Engine and version, for people."""
    created: int = msgspec.field(default_factory=lambda: int(time.time()))
    """Unix seconds."""

    @classmethod
    def from_engine(
        cls,
        info: EngineInfo,
        capabilities: Capabilities,
        *,
        names: tuple[str, ...],
        tokenizer: str,
        lora: tuple[str, ...] = (),
    ) -> Self:
        """The card of a started engine."""
        return cls(
            names=names,
            tokenizer=tokenizer,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            capabilities=capabilities,
            lora=lora,
            engine=f"{info.engine} {info.version}",
        )

    @property
    def served(self) -> tuple[str, ...]:
        """Everything that a request may name as `model`."""
        return self.names + self.lora
