"""A loaded model with its attention replaced: probes it, owns its KV cache, and computes a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from core.messages import ConfigError
from engines.torch.attention import NAME, paged_attention
from engines.torch.batch import pack
from engines.torch.kv_cache import LayerSpec, PagedCache
from engines.torch.scheduler import Chunk

AttentionInterface.register(NAME, paged_attention)

_UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "a position bias in its attention"}
_PROBE = "dynamo_probe"


class Runner:
    """Computes steps. Owned by the engine thread; everything runs there, in inference mode."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, device: str) -> None:
        self._model = model
        self.cache = cache
        self._device = device
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Returns when everything computed so far is in memory, for those who read it there."""
        if self._device != "cpu":
            torch.cuda.current_stream(self._device).synchronize()

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> tuple[Tensor, list[tuple[Chunk, Tensor]]]:
        """Computes the chunks' KV, and logits where they are needed.

        Gives float32 logits [n, V] of the n chunks that reach their sequence's end, in order, and for each chunk with
        prompt log-probabilities to collect the logits [m, V] at those of its positions that predict a prompt token.
        """
        ids, positions, paged = pack(chunks, self.cache, self._model.dtype, self._device)
        ends: list[int] = []
        prompts: list[tuple[Chunk, range]] = []
        row = 0
        for chunk in chunks:
            sequence, count = chunk
            row += count
            if count == sequence.num_left:
                ends.append(row - 1)
            if sequence.prompt_logprobs is not None and sequence.wants_prompt_logprobs:
                # Position p predicts token p + 1; a resumed sequence computes again what is collected already.
                first = max(sequence.num_computed, len(sequence.prompt_logprobs) - 1)
                last = min(sequence.num_computed + count, sequence.num_prompt_own - 1)
                offset = row - count - sequence.num_computed
                prompts.append((chunk, range(first + offset, last + offset)))
        wanted = ends + [index for _, span in prompts for index in span]
        keep = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        out = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, paged=paged)
        logits = out.logits[0].float()
        parts = logits.split([len(ends), *(len(span) for _, span in prompts)])
        return parts[0], [(chunk, part) for (chunk, _), part in zip(prompts, parts[1:], strict=True)]


@torch.inference_mode()
def probe(model: PreTrainedModel, device: str) -> list[LayerSpec]:
    """Runs one token through the model and notes what each layer's attention is called with.

    Raises: `ConfigError` when the model has layers that keep something other than plain keys and values.
    """
    kind = type(model).__name__
    seen: dict[int, LayerSpec] = {}
    text = model.config.get_text_config()
    layer_types = getattr(text, "layer_types", None)

    def record(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        index: int = module.layer_idx  # type: ignore[assignment]
        for name, what in _UNSUPPORTED.items():
            if kwargs.get(name) is not None:
                raise ConfigError(_refusal(kind, f"has {what}"))
        if index in seen or "paged" not in kwargs:
            raise ConfigError(_refusal(kind, "shares or hides the KV of its layers"))
        if not getattr(module, "is_causal", True):
            raise ConfigError(_refusal(kind, "attends to tokens that follow"))
        window = kwargs.get("sliding_window")
        of_type = layer_types[index] if layer_types else None
        if of_type not in (None, "full_attention", "sliding_attention"):
            raise ConfigError(_refusal(kind, f"has layers of type '{of_type}'"))
        if of_type == "sliding_attention" and window is None:
            window = text.sliding_window
        seen[index] = LayerSpec(key.shape[1], key.shape[3], value.shape[3], window)
        return query.transpose(1, 2)[..., : value.shape[3]], None

    AttentionInterface.register(_PROBE, record)
    model.set_attn_implementation(_PROBE)
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    model(
        input_ids=token,
        position_ids=token,
        use_cache=False,
        logits_to_keep=torch.zeros(1, dtype=torch.int64),
        paged=True,
    )
    model.set_attn_implementation(NAME)
    if sorted(seen) != list(range(text.num_hidden_layers)):
        raise ConfigError(_refusal(kind, f"has {text.num_hidden_layers} layers and {len(seen)} with plain attention"))
    return [seen[index] for index in sorted(seen)]


def _refusal(kind: str, why: str) -> str:
    return (
        f"The torch engine cannot run {kind}: it {why}, and only decoder-only models whose every layer keeps plain "
        "keys and values are supported; choose another model, or another engine with --engine."
    )
