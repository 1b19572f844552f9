"""Loads a model folder: checks what a user can get wrong first, so that each mistake is one sentence."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from core.messages import ConfigError
from engines.torch.attention import NAME
from engines.torch.kv_cache import LayerSpec
from engines.torch.model import probe
from engines.torch.settings import Settings

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_loading = threading.Lock()


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and what its folder says of it."""

    model: PreTrainedModel
    layers: list[LayerSpec]
    max_model_len: int
    """Tokens, by the configuration or the model."""
    eos_token_ids: tuple[int, ...]


def load(settings: Settings) -> Loaded:
    """Loads weights to the device. Blocks for as long as that takes, and while another engine of this process loads.

    Raises: `ConfigError` for a folder that is missing or incomplete and for a model that this engine cannot run.
    """
    # Loading switches settings of torch and transformers that the whole process shares: dtype, device, attention.
    with _loading, _without_bars():
        return _load(settings)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Whoever starts the engine shows its progress; a bar of transformers' own would write across that."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()  # type: ignore[no-untyped-call]


def _load(settings: Settings) -> Loaded:
    config = settings.config
    folder = Path(config.model)
    _check_folder(folder)
    try:
        hf_config = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from error
    _check_architecture(hf_config)
    _check_weights(folder)
    model: PreTrainedModel
    report: dict[str, Any]
    model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, by output_loading_info
        folder,
        config=hf_config,
        dtype=resolve_dtype(config.dtype, hf_config, settings.device),
        attn_implementation=NAME,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, in our words
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(report["missing_keys"]) or sorted(str(key) for key in report["mismatched_keys"])
        raise ConfigError(
            f"The weights in {folder} do not fit its config.json: {len(missing)} tensors are missing or of another "
            f"shape, the first is '{missing[0]}'; download the model again."
        )
    model = model.to(torch.device(settings.device)).eval()  # type: ignore[arg-type]  # its wrapper hides the type
    model = model.requires_grad_(requires_grad=False)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"The torch engine cannot run {type(model).__name__}: it cannot compute single positions' logits."
        )
    layers = probe(model, settings.device)
    return Loaded(model, layers, _max_model_len(settings, hf_config), _eos_token_ids(folder, hf_config))


def resolve_dtype(wanted: str, hf_config: Any, device: str) -> torch.dtype:
    """The dtype to compute in; "auto" is the checkpoint's, or float32 on a CPU that would have to emulate it."""
    stated = hf_config.get_text_config().dtype or torch.float32 if wanted == "auto" else wanted
    dtype: torch.dtype = getattr(torch, stated) if isinstance(stated, str) else stated
    if wanted == "auto" and device == "cpu" and dtype not in _native_dtypes():
        return torch.float32
    return dtype


def _native_dtypes() -> set[torch.dtype]:
    """What this processor multiplies matrices in by itself."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    native = {torch.float32, torch.float64}
    if words & {"avx512_bf16", "amx_bf16", "bf16"}:
        native.add(torch.bfloat16)
    if words & {"amx_fp16", "avx512_fp16"}:
        native.add(torch.float16)
    return native


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"Model folder {folder} does not exist: give a folder with config.json, or a hub id.")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Model folder {folder} has no config.json: it is not a Hugging Face model, or half-downloaded."
        )


def _check_architecture(hf_config: Any) -> None:
    kind = (getattr(hf_config, "architectures", None) or [hf_config.model_type])[0]
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ConfigError(f"The torch engine cannot run {kind}: it is an encoder-decoder; choose a decoder-only model.")
    remote = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if type(hf_config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise ConfigError(
            f"The torch engine cannot run {kind}: transformers has no causal language model of that type."
        )
    text = hf_config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ConfigError(f"The torch engine cannot run {kind}: its latent attention (MLA) is not supported.")
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        raise ConfigError(f"The torch engine cannot run {kind}: it attends to tokens that follow.")


def _check_weights(folder: Path) -> None:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged ({_first_line(error)}): download the model again.") from error
    elif (folder / _SINGLE).is_file():
        names = [_SINGLE]
    else:
        raise ConfigError(f"Model folder {folder} has no {_SINGLE} and no {_INDEX}: download the model again.")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{name} of {folder} is missing, though {_INDEX} names it: download the model again.")
        if (found := path.stat().st_size) != (expected := _stated_size(path)):
            raise ConfigError(
                f"{path} is damaged or half-downloaded: it has {found} bytes and its header says {expected}; "
                "download it again."
            )


def _stated_size(path: Path) -> int:
    """Bytes that a safetensors file must have by its own header; -1 when the header itself is cut off or damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return -1
    return 8 + length + max(ends, default=0)


def _max_model_len(settings: Settings, hf_config: Any) -> int:
    text = hf_config.get_text_config()
    limit: int = getattr(text, "max_position_embeddings", None) or settings.config.max_model_len or 2048
    rope = getattr(text, "rope_parameters", None) or {}
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            # Its frequencies change with the longest sequence of a batch: only the part before that is served, where
            # a request's output does not depend on who else is there.
            limit = min(limit, entry.get("original_max_position_embeddings") or limit)
    wanted = settings.config.max_model_len
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max-model-len is {wanted}, and the model's longest sequence is {limit} tokens: lower it.")
    return wanted or limit


def _eos_token_ids(folder: Path, hf_config: Any) -> tuple[int, ...]:
    found = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if found is None:
        found = hf_config.get_text_config().eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
